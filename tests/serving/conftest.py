"""What is asserted in helpers is shown like what is asserted in tests."""

import pytest

pytest.register_assert_rewrite("tests.serving.reference")
