"""The runtime checker behind shape annotations in tests: ints are fine where floats are asked."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
