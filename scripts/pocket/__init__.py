"""The pocket experiment's task, tokenizer and two models, made from a seed."""
