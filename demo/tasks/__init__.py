"""Task kinds of the demo generator, one module per source.

A kind is a function that takes a seeded Random and yields drafts. Each phrasing is yielded once, with numbers and names
drawn afresh and an answer computed from them, so that no two prompts differ in their numbers alone.
"""
