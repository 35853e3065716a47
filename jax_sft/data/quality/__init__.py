"""What is wrong with the conversations: faults of one of them, repeats, leaks; noted, left out or masked.

In: conversations as they were read. Out: those that stay, and an `Account` that names everything that was found, with
its place and an excerpt. Numpy only, no jax. `screen` has the order of the rules; each other module has one kind.
"""
