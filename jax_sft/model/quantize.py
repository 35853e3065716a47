"""stub while the real one is being written"""

import jax


class Int8:
    pass


class Nf4:
    pass


def dense(w, dtype):
    return w.astype(dtype)
