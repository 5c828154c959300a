"""Settings of the models."""

from __future__ import annotations

from dataclasses import dataclass

from spatial_impute._validation import require_positive


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
        for name in ("width", "n_heads", "n_neighs", "n_graph_layers", "n_level_layers", "n_steps", "n_gene_groups"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                msg = f"`{name}` must be an integer of at least 1, found {value!r}."
                raise ValueError(msg)
        if not isinstance(self.n_folds, int) or self.n_folds < 2:
            msg = f"`n_folds` must be an integer of at least 2, found {self.n_folds!r}."
            raise ValueError(msg)
        if self.width % self.n_heads:
            msg = f"`width` must be a multiple of `n_heads`, found {self.width} and {self.n_heads}."
            raise ValueError(msg)
        for name in ("learning_rate", "block_spacings"):
            require_positive(getattr(self, name), name=name)
        if not 0 <= self.dropout < 1 or self.correlation_weight < 0 or self.weight_decay < 0:
            msg = (
                "`dropout` must lie in [0, 1), `correlation_weight` and `weight_decay` must not be negative; found "
                f"{self.dropout!r}, {self.correlation_weight!r}, {self.weight_decay!r}."
            )
            raise ValueError(msg)

    @classmethod
    def paper(cls) -> AsignParams:
        """Three graph layers, eight heads, width 1024, as published."""
        return cls(width=1024, n_heads=8, n_graph_layers=3, n_level_layers=3, dropout=0.1)
