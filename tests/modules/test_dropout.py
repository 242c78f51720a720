from __future__ import annotations

import pytest
import torch

from fms_parallel.errors import ConfigError
from fms_parallel.modules.dropout import Dropout, keep_mask
from fms_parallel.modules.sequences import DropoutKey, Sequences
from tests.gradient import grad

CPU = torch.device("cpu")


def sequences(batch: int, length: int, seed: int = 0, first: int = 0) -> Sequences:
    return Sequences(batch, length, dropout=DropoutKey(seed, first))


def test_kept_elements_are_scaled_and_gradients_follow() -> None:
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    y = Dropout(0.25)(x, sequences(2, 5))
    kept = keep_mask(torch.Size((10, 8)), 0, 0.25, DropoutKey(0), 0, CPU).view(2, 5, 8)
    assert kept.any() and not kept.all()
    torch.testing.assert_close(y, torch.where(kept, x / 0.75, 0.0))
    y.sum().backward()
    torch.testing.assert_close(grad(x), torch.where(kept, 1 / 0.75, 0.0).double())


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_is_p_over_all_over_tokens_and_over_features(p: float) -> None:
    """Within five standard deviations of the binomial: over everything, per token and per feature."""
    rows, columns = 512, 256
    dropped = (~keep_mask(torch.Size((rows, columns)), 0, p, DropoutKey(1), 3, CPU)).double()
    for found, n in ((dropped.mean(), rows * columns), (dropped.mean(1), columns), (dropped.mean(0), rows)):
        assert ((found - p).abs() < 5 * (p * (1 - p) / n) ** 0.5).all()


def test_masks_of_other_seeds_places_and_neighbouring_tokens_are_independent() -> None:
    """Agreement of two fair masks is 1/2 within five standard deviations."""
    shape, n = torch.Size((256, 256)), 256 * 256

    def mask(seed: int = 0, salt: int = 0, first: int = 0) -> torch.Tensor:
        return keep_mask(shape, first, 0.5, DropoutKey(seed), salt, CPU)

    base = mask()
    others = [mask(seed=1), mask(salt=1), mask(seed=2**40), mask(salt=7, seed=3), base.roll(1, 0), base.roll(1, 1)]
    others += [mask(first=256), base.roll(7, 0), base.t()]
    for other in others:
        assert abs((base == other).double().mean() - 0.5) < 5 * 0.5 / n**0.5


def test_a_mask_depends_on_the_token_not_on_how_the_batch_is_cut() -> None:
    """What lets every layout, micro-batch and recomputation drop the same elements."""
    whole = Dropout(0.5, salt=3)(torch.ones(4, 6, 8), sequences(4, 6))
    pieces = [Dropout(0.5, salt=3)(torch.ones(2, 6, 8), sequences(2, 6, first=first)) for first in (0, 12)]
    assert torch.equal(whole, torch.cat(pieces))
    runs = [keep_mask(torch.Size((8, 8)), first, 0.5, DropoutKey(0), 3, CPU) for first in (0, 8, 16)]
    assert torch.equal(whole.view(24, 8) != 0, torch.cat(runs))


def test_nothing_is_dropped_at_p_zero_or_outside_training() -> None:
    x, nothing = torch.randn(1, 2, 3), Sequences(1, 2)
    assert torch.equal(Dropout(0.0)(x, nothing), x)
    assert torch.equal(Dropout(0.5).eval()(x, nothing), x)


def test_training_without_a_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="DropoutKey"):
        Dropout(0.5)(torch.randn(1, 2, 3), Sequences(1, 2))


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
def test_an_impossible_rate_is_refused(p: float) -> None:
    with pytest.raises(ConfigError, match=r"must be in \[0, 1\)"):
        Dropout(p)


def test_numbers_of_the_generator_do_not_change_it() -> None:
    """No generator is read or moved, so nothing has to be checkpointed."""
    before = torch.get_rng_state()
    Dropout(0.5)(torch.ones(1, 2, 3), sequences(1, 2))
    assert torch.equal(before, torch.get_rng_state())
