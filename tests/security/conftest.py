"""Four enrolled hospitals, as the hospitals' own tests make them."""

from tests.client.hospital.conftest import bundle_of, consortium, local  # noqa: F401 - fixtures
