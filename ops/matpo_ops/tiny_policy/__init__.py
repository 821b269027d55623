"""How the shipped tiny policy is made: tokenizer, scripted episodes, supervised warm start."""
