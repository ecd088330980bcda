"""`tubelet bench answers`: accuracy of the small video language model against kept tokens."""
