"""The data room: files become conversations, conversations become token sequences, sequences become packed rows.

file -source-> row -formats-> Conversation -chat-> Sequence -dataset-> TokenizedSet -packing, loader-> Batch.
Numpy only: nothing here imports jax, so that a data worker never starts a device.
"""
