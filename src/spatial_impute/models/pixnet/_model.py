"""The PixNet model: a network, and the information to apply it to other slides and to interpret its values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from spatial_impute._image.resampling import resampled_image
from spatial_impute._validation import name_list, require_key
from spatial_impute.encoders._encoder import ENCODERS, weights_hash
from spatial_impute.encoders._pyramids import build_pyramid
from spatial_impute.models._params import PixNetParams
from spatial_impute.models._storage import (
    PixNetOrigin,
    checked_origin,
    config_errors,
    json_columns,
    load_model,
    require_shapes,
    save_model,
)
from spatial_impute.models.pixnet._network import PixNetNetwork, Stain, receptive_halo
from spatial_impute.models.pixnet._tiles import Slide, Tiling, iter_sums

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from spatial_impute._image.levels import Level
    from spatial_impute._image.resampling import SlideOverview
    from spatial_impute.models._storage import ModelConfig
    from spatial_impute.models.pixnet._region_weights import Regions


@dataclass(eq=False, repr=False)
class PixNetModel:
    """A fitted PixNet; made by :func:`~spatial_impute.tl.fit_pixnet` or :meth:`load`.

    Examples
    --------
    >>> import spatial_impute as si
    >>> model = si.tl.fit_pixnet(sdata, "s1_image", "s1_spots")  # doctest: +SKIP
    >>> model.save("pixnet")  # doctest: +SKIP
    >>> model = si.models.PixNetModel.load("pixnet")  # doctest: +SKIP
    >>> si.tl.predict_regions(sdata, "s0_spots", model)  # doctest: +SKIP
    """

    network: PixNetNetwork
    """The :class:`torch.nn.Module`: RGB to features to genes."""
    params: PixNetParams = field(kw_only=True)
    """Settings."""
    var_names: list[str] = field(kw_only=True)
    """Genes."""
    history: pd.DataFrame = field(kw_only=True)
    """Loss, and error and mean correlation per gene on the held-out regions, by step; ``kept`` marks the step of the
    model. Step 0 is the linear base alone, later steps are the best weighted sum of base and decoder. ``held_out_loss`` of log
    values is the squared error in units of their variance, that of counts the loss."""
    predictability: pd.Series = field(kw_only=True)
    """Pearson correlation of each gene on held-out regions of the training slides."""
    config: dict[str, Any] = field(kw_only=True)
    """``encoder``, ``resolution`` (um per pixel), ``units``, ``aggregate`` (``"mean"`` or ``"sum"``), stain of the
    training slides, and provenance."""

    def __post_init__(self) -> None:
        self.network.eval()
        self.var_names = list(self.var_names)

    def __repr__(self) -> str:
        r = self.predictability.mean()
        return (
            f"PixNetModel({len(self.var_names)} genes, encoder {self.config['encoder']!r}, "
            f"{self.config['resolution']:g} um per pixel, held-out r per gene {r:.3f})"
        )

    @property
    def cell_size(self) -> float:
        """Edge of a cell of the dense map in um."""
        return self.config["resolution"] * self.network.stride

    @cached_property
    def halo(self) -> int:
        """Pixels of context that a tile needs to equal the whole slide; measured on the network."""
        return receptive_halo(self.network)

    @cached_property
    def identity(self) -> str:
        """Hash of the weights; maps store it."""
        return weights_hash(self.network)

    def gene_index(self, genes: Sequence[str] | None) -> list[int]:
        """Positions of `genes`; all by default.

        Raises
        ------
        KeyError
            For genes that the model does not predict.
        ValueError
            If `genes` is empty.
        """
        if genes is None:
            return list(range(len(self.var_names)))
        genes = name_list(genes, name="genes")
        if not genes:
            msg = "`genes` is empty; name some of `model.var_names`, or leave it out for all."
            raise ValueError(msg)
        place = {gene: i for i, gene in enumerate(self.var_names)}
        for gene in genes:
            require_key(gene, self.var_names, where="model.var_names")
        return [place[gene] for gene in genes]

    def _slide(self, levels: list[Level], overview: SlideOverview, tile_size: int) -> Slide:
        """A slide as the network reads it: its resolution, the stain of the training slides, tiles."""
        image = resampled_image(levels, self.config["resolution"])
        stain = match_stain(overview, self.config["stain_density"] if self.params.match_stain else None)
        return Slide(image, stain, Tiling.of_network(self.network, image.shape, tile_size, self.halo))

    def _read_regions(
        self,
        slide: Slide,
        regions: Regions,
        index: list[int],
        *,
        on_tile: Callable[[], None] = lambda: None,
        out: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Values (n, n_genes) of some genes at regions (in pixels of the slide), and the numbers of pixels (n,).

        Values are NaN for regions without a pixel on the image. They are written to `out` if given.
        """
        network = self.network.with_genes(index)
        linear = not network.rates
        # A linear head is applied to the features of regions instead of every cell. A rate is not linear.
        stage = network.combine if linear else network.predict
        pixel_area = abs(np.linalg.det(slide.image.to_um[:2, :2]))
        values = np.empty((len(regions), len(index)), np.float32) if out is None else out
        n_pixels = np.zeros(len(regions))
        for rows, sums, count in iter_sums(network, stage, slide, regions, on_tile=on_tile):
            n_pixels[rows] = count
            if not count.any():
                values[rows] = np.nan
                continue
            with torch.inference_mode():
                size = torch.from_numpy(count).to(sums)[:, None]
                means = sums / size  # NaN for regions without pixels
                found = network.from_pooled(means) if linear else means
                if self.config["aggregate"] == "sum":
                    found = found * size * pixel_area
            values[rows] = found.cpu().numpy()
        return values, n_pixels

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write ``config.json`` and ``model.safetensors`` into a directory.

        Raises
        ------
        FileExistsError
            If there is something at `path` and `overwrite` is False.
        """
        config = {
            "params": asdict(self.params),
            "var_names": self.var_names,
            "n_base": self.network.n_base,
            "rates": self.network.rates,
            "history": json_columns(self.history),
            "predictability": [None if np.isnan(r) else float(r) for r in self.predictability],
            "config": self.config,
        }
        tensors = {key: value.detach().cpu() for key, value in self.network.state_dict().items()}
        save_model(path, kind=type(self).__name__, config=config, tensors=tensors, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path, *, encoder: nn.Module | None = None) -> PixNetModel:
        """Read a model written by :meth:`save`.

        Parameters
        ----------
        path
            The directory.
        encoder
            Module with the architecture of the encoder, if the model was fitted with your own module; its weights are
            read from the directory.

        Raises
        ------
        FileNotFoundError
            If a file is missing.
        ValueError
            If the directory holds another class of model, or weights that do not fit the configuration, or if the model
            has your own encoder and `encoder` is missing.
        """
        config, tensors = load_model(path, kind=cls.__name__)
        with config_errors(path):
            return cls._from_config(path, config, tensors, encoder)

    @classmethod
    def _from_config(
        cls, path: str | Path, config: ModelConfig, tensors: dict[str, Tensor], encoder: nn.Module | None
    ) -> PixNetModel:
        origin = checked_origin(config, PixNetOrigin)
        name = origin["encoder"]
        if encoder is None and name not in ENCODERS:
            msg = f"The model in {str(path)!r} has the encoder {name!r}; pass a module of this architecture as `encoder=`."
            raise ValueError(msg)
        params = PixNetParams(**config["params"])
        pyramid = build_pyramid(name if encoder is None else encoder, window=params.encoder_window, pretrained=False)

        def build() -> PixNetNetwork:
            return PixNetNetwork(
                pyramid,
                params,
                n_genes=len(config["var_names"]),
                n_base=config["n_base"],
                rates=config["rates"],
                resolution=origin["resolution"],
            )

        require_shapes(path, build, tensors, (len(config["var_names"]), params.width, config["n_base"]))
        network = build()
        network.load_state_dict(tensors)
        network.requires_grad_(False)
        pyramid.name = name
        model = cls(
            network,
            params=params,
            var_names=config["var_names"],
            history=pd.DataFrame(config["history"]),
            predictability=pd.Series(config["predictability"], index=config["var_names"], dtype=float),
            config=origin,
        )
        repr(model)  # fails if encoder, resolution or score are missing
        return model


def match_stain(found: SlideOverview, reference: Sequence[float] | None) -> Stain:
    """Stain of a slide on white glass, matched to a reference's mean optical density if there is one."""
    if reference is None:
        return Stain(found.background)
    return Stain(found.background, tuple(float(r / d) for r, d in zip(reference, found.density, strict=True)))
