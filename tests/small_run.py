"""A tiny target with features and a vocabulary map, under the names that the tests have for it."""

from eagle3fn.testing import tiny_run

SIZE = tiny_run.SIZE
write_run = tiny_run.write_tiny_run
