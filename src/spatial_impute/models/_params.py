"""Settings of the models."""

from __future__ import annotations

from dataclasses import dataclass

from spatial_impute._validation import make_floats, require_one_of, require_positive

_LARGEST = 1e18  # of step sizes and weights: products of two are numbers in single precision, beyond it torch fails


@dataclass(frozen=True, slots=True)
class AsignParams:
    """Advanced settings of :func:`~spatial_impute.tl.fit_asign`.

    The defaults suit the few hundred measured spots of one or a few sections; :meth:`paper` gives the size of the
    published network.

    Examples
    --------
    >>> AsignParams(width=128).n_heads
    4
    """

    width: int = 64
    """Width of the network."""
    n_heads: int = 4
    """Attention heads."""
    n_neighs: int = 12
    """Strongest edges into a spot that the network attends to; 12 as published. Propagation uses all edges."""
    n_graph_layers: int = 2
    """Layers of attention over the 3D graph."""
    n_level_layers: int = 1
    """Layers of the transformer over the levels of a spot."""
    dropout: float = 0.5
    """Share of activations dropped in training."""
    correlation_weight: float = 0.5
    """Weight of 1 - Pearson correlation in the loss, beside the squared error of standardised expression."""
    learning_rate: float = 1e-3
    """Step size of AdamW at the start; it decays to zero along a cosine."""
    weight_decay: float = 0.5
    """Weight decay of AdamW."""
    n_steps: int = 150
    """Steps of training, each on one masked block; the best on held-out blocks is kept."""
    n_folds: int = 5
    """Folds of the cross-validation within one measured section."""
    block_spacings: float = 2.0
    """Edge of the held-out blocks in spot spacings."""
    n_gene_groups: int = 4
    """Groups of genes, by how well the best baseline predicts them, that share the weight of propagated labels
    within the network."""

    def __post_init__(self) -> None:
        make_floats(self)
        for name in ("width", "n_heads", "n_neighs", "n_graph_layers", "n_level_layers", "n_steps", "n_gene_groups"):
            value = getattr(self, name)
            most = 2**31 if name in ("n_steps", "n_neighs") else 2**14  # beyond it no machine holds the network
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                msg = f"`{name}` must be an integer of at least 1 and at most {most}, found {value!r}."
                raise ValueError(msg)
        if not isinstance(self.n_folds, int) or self.n_folds < 2:
            msg = f"`n_folds` must be an integer of at least 2, found {self.n_folds!r}."
            raise ValueError(msg)
        if self.width % self.n_heads:
            msg = f"`width` must be a multiple of `n_heads`, found {self.width} and {self.n_heads}."
            raise ValueError(msg)
        for name in ("learning_rate", "block_spacings"):
            require_positive(getattr(self, name), name=name)
        if not 0 <= self.dropout < 1:
            msg = f"`dropout` must lie in [0, 1), found {self.dropout!r}."
            raise ValueError(msg)
        _require_rates(self, "learning_rate", "correlation_weight", "weight_decay")

    @classmethod
    def paper(cls) -> AsignParams:
        """Three graph layers, eight heads, width 1024, as published."""
        return cls(width=1024, n_heads=8, n_graph_layers=3, n_level_layers=3, dropout=0.1)


@dataclass(frozen=True, slots=True)
class PixNetParams:
    """Advanced settings of :func:`~spatial_impute.tl.fit_pixnet`.

    The defaults suit a CPU and a few hundred spots; :meth:`paper` gives the size of the published network.

    Examples
    --------
    >>> PixNetParams(width=128).loss
    'mse+pcc'
    """

    width: int = 64
    """Channels of the decoder."""
    finest_stride: int = 8
    """Pixels along a cell of the decoder's grid, at least; finer maps of the encoder are left out. 4 as published, at
    four times the cost."""
    n_base: int = 128
    """Principal components of the encoder's maps in the linear base; 0 leaves the base out, as published."""
    context_um: tuple[float, ...] = (200.0, 320.0, 450.0, 830.0)
    """Edges of the windows around each place whose mean features, and their spread, enter the base; none for ``()``."""
    norm: str = "layer"
    """Norm within the decoder: ``"layer"`` over the channels of each cell, or ``"batch"``. With the few crops of a step
    the running statistics of batch norm trail behind, and what is watched drifts from what is trained."""
    delta: float = 1.0
    """Start of the learned scale of each lateral map."""
    loss: str = "mse+pcc"
    """``"mse+pcc"`` on log-normalised values; ``"poisson"`` or ``"nb"`` (negative binomial) on counts."""
    correlation_weight: float = 0.5
    """Weight of 1 - Pearson correlation per gene across the regions of a batch, beside the squared error."""
    resolution: float | None = None
    """um per pixel to work at; by default that of the encoder."""
    crop: int = 768
    """Edge of a training crop in px; rounded up to a multiple of the coarsest cell, and until a region fits."""
    margin: int = 32
    """Regions nearer than this (px) to the edge of a crop are left out of it: cells there lack context."""
    n_crops: int = 8
    """Crops per step."""
    n_cached_crops: int = 128
    """Crops drawn and encoded once, from which all batches come: much quicker on a CPU. 0 draws new ones in every step,
    as does a trained encoder."""
    max_regions: int = 4096
    """Regions of a crop that enter a step; more are drawn from at random."""
    n_steps: int = 200
    """Most steps of training."""
    n_steps_per_check: int = 10
    """Steps between looks at the held-out regions."""
    patience: int = 5
    """Looks without improvement after which training stops."""
    held_out_fraction: float = 0.2
    """Share of the blocks of each training slide that decide when to stop; they are not trained on."""
    learning_rate: float = 5e-4
    """Step size of Adam; 5e-4 as published."""
    encoder_learning_rate: float = 0.0
    """Step size for the encoder; 0 keeps it as it is."""
    weight_decay: float = 1e-4
    """Weight decay of Adam; 1e-4 as published."""
    flips: bool = True
    """Train on all eight flips and quarter turns of the crops."""
    stain_jitter: float = 0.1
    """Spread of the random factor on the optical density of each channel, and of its exponent on the whole."""
    match_stain: bool = True
    """Bring the mean optical density of the tissue of each slide to that of the training slides."""

    def __post_init__(self) -> None:
        make_floats(self)
        counts = ("width", "finest_stride", "crop", "n_crops", "max_regions", "n_steps_per_check", "patience")
        for name, least in {
            **dict.fromkeys(counts, 1),
            "n_base": 0,
            "n_cached_crops": 0,
            "n_steps": 0,
            "margin": 0,
        }.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                msg = f"`{name}` must be an integer of at least {least}, found {value!r}."
                raise ValueError(msg)
        windows = tuple(float(require_positive(w, name="context_um", unit="um")) for w in self.context_um)
        object.__setattr__(self, "context_um", windows)  # lists come from files
        require_one_of(self.norm, ("batch", "layer"), name="norm")
        require_one_of(self.loss, ("mse+pcc", "poisson", "nb"), name="loss")
        require_positive(self.learning_rate, name="learning_rate")
        if self.resolution is not None:
            resolution = require_positive(self.resolution, name="resolution", unit="um per pixel")
            object.__setattr__(self, "resolution", resolution)
        if not 0 < self.held_out_fraction < 1:
            msg = f"`held_out_fraction` must lie between 0 and 1, found {self.held_out_fraction!r}."
            raise ValueError(msg)
        _require_rates(
            self, "learning_rate", "correlation_weight", "encoder_learning_rate", "weight_decay", "stain_jitter"
        )

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


def _require_rates(params: AsignParams | PixNetParams, *names: str) -> None:
    for name in names:
        value = getattr(params, name)
        if not 0 <= value <= _LARGEST:  # nor NaN
            msg = f"`{name}` must not be negative, and at most {_LARGEST:g}; found {value!r}."
            raise ValueError(msg)
