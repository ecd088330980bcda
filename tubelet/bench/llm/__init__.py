"""Speed and agreement of video language models with recipes: `tubelet bench llm`."""
