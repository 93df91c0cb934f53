"""The table of the zoo in the documentation."""

import collections

# Name of a program -> (optimizer, strategy) -> the largest deviation from plain Keras.
FOUND = collections.defaultdict(dict)
