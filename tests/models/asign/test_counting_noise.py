from __future__ import annotations

import numpy as np

from spatial_impute.models.asign._counting_noise import counting_weights


def test_counting_weights_find_both_parts_of_the_variance():
    rng = np.random.default_rng(0)
    counting = rng.gamma(1.0, size=3000) + 0.05
    counting /= counting.mean()
    residuals = rng.normal(size=(3000, 20)) * np.sqrt(0.5 + 2.0 * counting)[:, None]
    expected = 1.0 / (0.5 + 2.0 * counting)
    np.testing.assert_allclose(counting_weights(residuals, counting), expected / expected.mean(), rtol=0.15)


def test_counting_weights_are_one_where_depth_explains_nothing():
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(counting_weights(rng.normal(size=(50, 4)), np.ones(50)), 1.0)
    assert (counting_weights(np.zeros((50, 4)), rng.random(50)) == 1).all()
