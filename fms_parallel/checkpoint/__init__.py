"""Checkpoints: weights in and out of any format, and the state of a training run, in any layout.

lazy.py            tensors that are not read yet, and views of them that translate boxes
template.py        key patterns that can be read in both directions
adapter.py         named, invertible steps between a format's keys and tensors and ours
files.py           weight files in (one, a folder, an index), safetensors files out
torch_files.py     guarded .bin / .pth / .pt files in, mapped
meta.py            Meta's consolidated.NN.pth files, any number of them, in and out
slots.py           what a model holds: names, ties, this rank's box
load.py            weights into a model, each rank reading only its own boxes
export.py          weights out of a model, piece by piece, each rank writing some of the files
spread.py          tensors that lie in boxes on many ranks, read by one of them
training_state.py  model + optimizer + plain numbers of a run, saved atomically, loadable in any layout
named.py           model and optimizer as one flat dict of named tensors, and back
background.py      the same while training goes on
manifest.py        the page that makes a training checkpoint valid: lengths and SHA-256 of its files
words.py           how messages list keys
agree.py           a failure on one rank is a failure on all
"""
