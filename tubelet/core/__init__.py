"""Values and rules that every other part of tubelet shares."""
