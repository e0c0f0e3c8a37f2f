"""What a run will need, estimated before it starts: no weights are read, nothing is loaded.

Sizes are bytes unless a name says otherwise. Legend: L tokens of a micro-batch, N student tokens of them, V shared
vocabulary, D and E the models' hidden sizes, W ranks.
"""
