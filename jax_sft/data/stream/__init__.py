"""Sets that are read while training: shards near or far, lanes, blocks, and batches that go on where they stopped.

Row r of every batch comes from lane r. The units of all shards are dealt to the lanes once; a host reads the lanes of
its own rows and no others. A lane reads block after block; where it is, is a few integers.
"""
