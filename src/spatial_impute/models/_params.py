"""Settings of the models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from spatial_impute._params import Count, Flag, Natural, Number, Positive, Whole, settings_class

# The product of two step sizes or weights must be a number in single precision, else torch fails.
Rate = Annotated[Number, Field(ge=0, le=1e18)]
Size = Annotated[Whole, Field(ge=1, le=2**14)]  # no machine holds a larger network
Repeats = Annotated[Whole, Field(ge=1, le=2**31)]


@settings_class
class AsignParams:
    """Advanced settings of :func:`~spatial_impute.tl.fit_asign`.

    The defaults suit the few hundred measured spots of one or a few sections; :meth:`paper` gives the size of the
    published network.

    Examples
    --------
    >>> AsignParams(width=128).n_heads
    4
    """

    width: Size = 64
    """Width of the network."""
    n_heads: Size = 4
    """Attention heads."""
    n_neighs: Repeats = 12
    """Strongest edges into a spot that the network attends to; 12 as published. Propagation uses all edges."""
    n_graph_layers: Size = 2
    """Layers of attention over the 3D graph."""
    n_level_layers: Size = 1
    """Layers of the transformer over the levels of a spot."""
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.5
    """Share of activations dropped in training."""
    correlation_weight: Rate = 0.5
    """Weight of 1 - Pearson correlation in the loss, beside the squared error of standardised expression."""
    learning_rate: Annotated[Number, Field(gt=0, le=1e18)] = 1e-3
    """Step size of AdamW at the start; it decays to zero along a cosine."""
    weight_decay: Rate = 0.5
    """Weight decay of AdamW."""
    n_steps: Repeats = 150
    """Steps of training, each on one masked block; the best on held-out blocks is kept."""
    n_folds: Annotated[Whole, Field(ge=2)] = 5
    """Folds of the cross-validation within one measured section."""
    block_spacings: Positive = 2.0
    """Edge of the held-out blocks in spot spacings."""
    n_gene_groups: Size = 4
    """Groups of genes, by how well the best baseline predicts them, that share the weight of propagated labels
    within the network."""

    def __post_init__(self) -> None:
        if self.width % self.n_heads:
            msg = f"`width` must be a multiple of `n_heads`, found {self.width} and {self.n_heads}."
            raise ValueError(msg)

    @classmethod
    def paper(cls) -> AsignParams:
        """Three graph layers, eight heads, width 1024, as published."""
        return cls(width=1024, n_heads=8, n_graph_layers=3, n_level_layers=3, dropout=0.1)


@settings_class
class PixNetParams:
    """Advanced settings of :func:`~spatial_impute.tl.fit_pixnet`.

    The defaults suit a CPU and a few hundred spots; :meth:`paper` gives the size of the published network.

    Examples
    --------
    >>> PixNetParams(width=128).loss
    'mse+pcc'
    """

    width: Count = 64
    """Channels of the decoder."""
    finest_stride: Count = 8
    """Pixels along a cell of the decoder's grid, at least; finer maps of the encoder are left out. 4 as published, at
    four times the cost."""
    n_base: Natural = 128
    """Principal components of the encoder's maps in the linear base; 0 leaves the base out, as published."""
    context_um: tuple[Positive, ...] = (200.0, 320.0, 450.0, 830.0)
    """Edges of the windows around each place whose mean features, and their spread, enter the base; none for ``()``."""
    norm: Literal["batch", "layer"] = "layer"
    """Norm within the decoder: ``"layer"`` over the channels of each cell, or ``"batch"``. With the few crops of a step
    the running statistics of batch norm trail behind, and what is watched drifts from what is trained."""
    delta: Number = 1.0
    """Start of the learned scale of each lateral map."""
    loss: Literal["mse+pcc", "poisson", "nb"] = "mse+pcc"
    """``"mse+pcc"`` on log-normalised values; ``"poisson"`` or ``"nb"`` (negative binomial) on counts."""
    correlation_weight: Rate = 0.5
    """Weight of 1 - Pearson correlation per gene across the regions of a batch, beside the squared error."""
    resolution: Positive | None = None
    """um per pixel to work at; by default that of the encoder."""
    crop: Count = 768
    """Edge of a training crop in px; rounded up to a multiple of the coarsest cell, and until a region fits."""
    margin: Natural = 32
    """Regions nearer than this (px) to the edge of a crop are left out of it: cells there lack context."""
    n_crops: Count = 8
    """Crops per step."""
    n_cached_crops: Natural = 128
    """Crops drawn and encoded once, from which all batches come: much quicker on a CPU. 0 draws new ones in every step,
    as does a trained encoder."""
    max_regions: Count = 4096
    """Regions of a crop that enter a step; more are drawn from at random."""
    n_steps: Natural = 200
    """Most steps of training."""
    n_steps_per_check: Count = 10
    """Steps between looks at the held-out regions."""
    patience: Count = 5
    """Looks without improvement after which training stops."""
    held_out_fraction: Annotated[Number, Field(gt=0, lt=1)] = 0.2
    """Share of the blocks of each training slide that decide when to stop; they are not trained on."""
    learning_rate: Annotated[Number, Field(gt=0, le=1e18)] = 5e-4
    """Step size of Adam; 5e-4 as published."""
    encoder_learning_rate: Rate = 0.0
    """Step size for the encoder; 0 keeps it as it is."""
    weight_decay: Rate = 1e-4
    """Weight decay of Adam; 1e-4 as published."""
    flips: Flag = True
    """Train on all eight flips and quarter turns of the crops."""
    stain_jitter: Rate = 0.1
    """Spread of the random factor on the optical density of each channel, and of its exponent on the whole."""
    match_stain: Flag = True
    """Bring the mean optical density of the tissue of each slide to that of the training slides."""

    @classmethod
    def paper(cls) -> PixNetParams:
        """Width 512, no base, encoder trained as well, as published."""
        return cls(
            width=512,
            finest_stride=4,
            n_base=0,
            n_cached_crops=0,
            crop=1024,
            n_steps=20_000,
            patience=50,
            encoder_learning_rate=5e-5,
        )
