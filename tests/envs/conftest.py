"""The compiled stream of tests/serve, for environments that share it."""

from tests.serve.conftest import opened, stream  # noqa: F401
