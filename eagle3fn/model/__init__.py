"""`Batch` to loss: parameter table, layers, attention over the unroll, teacher, losses,
`forward_loss`.
"""
