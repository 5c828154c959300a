"""Settings of the models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from spatial_impute._validation import Count, Flag, Natural, Number, Positive, Whole, settings_class

# The product of two step sizes or weights must be a number in single precision, else torch fails.
Rate = Annotated[Number, Field(ge=0, le=1e18)]
Size = Annotated[Whole, Field(ge=1, le=2**14)]  # no machine holds a larger network
Repeats = Annotated[Whole, Field(ge=1, le=2**31)]


@settings_class
class AsignParams:
    """Advanced settings of :func:`~spatial_impute.tl.fit_asign`.

    The defaults suit the measured spots of one or a few sections; :meth:`paper` gives the published network.

    Examples
    --------
    >>> AsignParams(width=128).n_heads
    4
    """

    width: Size = 64
    """Width of the network."""
    n_heads: Size = 4
    """Attention heads."""
    n_neighs: Repeats = 8
    """Number of strongest edges into a spot that the network uses of each type: in the section, across sections, and
    between similar images. Propagation uses all edges."""
    n_graph_layers: Size = 2
    """Layers of attention over the 3D graph."""
    level_graph: Flag = False
    """Attention over the 3D graph also for the larger fields of view of the spots, as published."""
    n_level_layers: Size = 1
    """Layers of the transformer over the levels of a spot."""
    base: Literal["auto", "mean", "propagation", "cokriging", "cokriging-two-views", "none"] = "auto"
    """Prediction to which the network adds its correction: ``"auto"`` takes the one with the lowest error on hidden blocks.
    ``"cokriging-two-views"`` is the mean of co-kriging with all image features, and with those that sections share.
    ``"none"`` is the network as published, without a base."""
    dropout: Annotated[Number, Field(ge=0, lt=1)] | None = None
    """Share of activations that are dropped in training. This and the next three settings are chosen together by the error
    on hidden blocks, from cautious to free; a value that is given is not changed."""
    weight_decay: Rate | None = None
    """Weight decay of AdamW."""
    auxiliary_weight: Rate = 0.0
    """Weight in the loss of what the larger fields of view predict for the mean of the measured spots inside them."""
    consistency_weight: Rate = 0.0
    """Weight in the loss of what the larger fields of view predict for the spot itself."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """``"adamw"``, or ``"sgd"`` with momentum 0.9 as published."""
    learning_rate: Annotated[Number, Field(gt=0, le=1e18)] | None = None
    """Step size at the start; it decays to zero, along a cosine or, for ``"sgd"``, nearly linearly."""
    n_steps: Repeats | None = None
    """Steps of training."""
    correlation_weight: Rate = 0.5
    """Weight of 1 - Pearson correlation in the loss, added to the squared error of standardised expression."""
    n_folds: Annotated[Whole, Field(ge=2)] = 5
    """Folds of the cross-validation within one measured section."""
    block_spacings: Positive = 2.0
    """Edge length of the held-out blocks in spot spacings."""
    n_gene_groups: Size = 4
    """Groups of genes with a similar score of the best baseline. A group shares the weight of propagated labels in the
    network."""

    def __post_init__(self) -> None:
        if self.width % self.n_heads:
            msg = f"`width` must be a multiple of `n_heads`, found {self.width} and {self.n_heads}."
            raise ValueError(msg)

    @classmethod
    def paper(cls) -> AsignParams:
        """Settings of the publication: no base, three graph layers, eight heads, width 1024, SGD, losses of all levels.

        One step sees all measured spots, so that the 51 epochs of the publication are as many steps. Here correlations in
        the losses are per gene across spots, and not per spot across genes: the mean profile alone reaches those.
        """
        return cls(
            base="none",
            width=1024,
            n_heads=8,
            n_graph_layers=3,
            n_level_layers=3,
            level_graph=True,
            n_neighs=12,
            dropout=0.1,
            correlation_weight=1 / 3,
            auxiliary_weight=1 / 6,
            consistency_weight=1 / 6,
            optimizer="sgd",
            learning_rate=1e-3,
            weight_decay=0.0,
            n_steps=51,
        )


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
    """Smallest edge of a cell of the decoder in pixels; finer maps of the encoder are not used. 4 as published, at four
    times the cost."""
    n_base: Natural = 128
    """Principal components of the encoder's maps in the linear base; 0 for no base, as published."""
    context_um: tuple[Positive, ...] = (200.0, 320.0, 450.0, 830.0)
    """Edges in um of the windows around each cell whose mean features, and their spread, enter the base; or ``()``."""
    norm: Literal["batch", "layer"] = "layer"
    """Norm within the decoder: ``"layer"`` over the channels of each cell, or ``"batch"``. With few crops per
    step, the running statistics of batch norm lag behind training."""
    delta: Number = 1.0
    """Start of the learned scale of each lateral map."""
    loss: Literal["mse+pcc", "poisson", "nb"] = "mse+pcc"
    """``"mse+pcc"`` on log-normalised values; ``"poisson"`` or ``"nb"`` (negative binomial) on counts."""
    correlation_weight: Rate = 0.5
    """Weight of 1 - Pearson correlation per gene across the regions of a batch, added to the squared error."""
    resolution: Positive | None = None
    """Resolution of the images in um per pixel; by default that of the encoder."""
    encoder_window: Count | None = None
    """Edge in px of the windows that your own encoder reads one by one; for encoders with attention over the whole image
    (vision transformers), whose values would otherwise depend on the tiles. The size of their training is a good choice."""
    crop: Count = 384
    """Edge of a training crop in px; enlarged to a multiple of the coarsest cell and to the size of a region."""
    margin: Natural = 32
    """Regions nearer than this (px) to the edge of a crop are not used in it: cells there have too little context."""
    n_crops: Count = 8
    """Crops per step."""
    n_cached_crops: Natural = 128
    """Crops that are drawn and encoded once for all batches: much faster on a CPU. 0 draws new crops in each step, as
    does training of the encoder."""
    max_regions: Count = 4096
    """Largest number of regions of a crop in a step; of more regions a random sample is used."""
    n_steps: Natural = 300
    """Largest number of steps of training."""
    n_steps_per_check: Count = 20
    """Steps between evaluations of the held-out regions."""
    patience: Count = 10
    """Evaluations without improvement after which training stops. The default is two thirds of all evaluations: the first
    steps, while the step size is high, often bring nothing."""
    held_out_fraction: Annotated[Number, Field(gt=0, lt=1)] = 0.2
    """Share of the blocks of each training slide that are not used for training, but to choose the step and to confirm
    the choice."""
    learning_rate: Annotated[Number, Field(gt=0, le=1e18)] = 1e-3
    """Largest step size of Adam; 5e-4 as published."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Step size over the steps: ``"cosine"`` rises over the first tenth and falls to zero along a cosine; ``"constant"`` as
    published."""
    encoder_learning_rate: Rate = 0.0
    """Step size for the encoder; 0 does not train it."""
    weight_decay: Rate = 1e-4
    """Weight decay of Adam; 1e-4 as published."""
    flips: Flag = True
    """Train with all eight flips and quarter turns of the crops."""
    stain_jitter: Rate = 0.1
    """Spread of the random factor on the optical density of each channel, and of the exponent on the density."""
    match_stain: Flag = True
    """Scale the mean optical density of the tissue of each slide to that of the training slides."""

    @classmethod
    def paper(cls) -> PixNetParams:
        """Settings of the publication: width 512, batch norm, no base, one constant step size for decoder and encoder."""
        return cls(
            width=512,
            finest_stride=4,
            n_base=0,
            n_cached_crops=0,
            crop=1024,
            norm="batch",
            n_steps=20_000,
            patience=50,
            learning_rate=5e-4,
            schedule="constant",
            encoder_learning_rate=5e-4,
        )
