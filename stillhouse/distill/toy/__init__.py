"""Small models and problems that the project makes itself, without a download.

Reading order:
    problems     sums with worked solutions, and the copying task
    styles       the ways in which a solution can be written; each pair of the zoo has its own
    recipes      the steps by which a small teacher or student is trained
    tiny         make the models of a pair, once, into the cache

`distill.pairs` imports `tiny`; `distill.prompts` imports `problems` for generated rows.
"""
