"""What is shown of the data: a summary that holds the facts once, as text for a terminal and as a self-contained page.

`summary` counts, `terminal` and `page` show, `card` says where the data come from, `plots` draws.
"""
