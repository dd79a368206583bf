from collections.abc import Iterator

import pytest

from trainer.losses import kernel


@pytest.fixture(params=["kernel", "torch"], scope="module")
def _both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a module's tests with the compiled kernel, and then as where there is none."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(kernel, "takes", lambda *tensors: False)
        elif not kernel.is_loaded():
            pytest.skip("the kernel is not compiled here")
        yield
