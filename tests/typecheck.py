"""This file is where the type checker that the tests switch on is configured."""

from beartype import BeartypeConf, beartype

# An int is a float, as everywhere else in Python's typing; beartype alone says otherwise.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
