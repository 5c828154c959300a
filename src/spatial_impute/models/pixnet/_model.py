"""The PixNet model: a network with what it takes to apply it to another slide, and to know what its numbers mean."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from spatial_impute._image.resampling import resampled_image
from spatial_impute._validation import name_list, require_key
from spatial_impute.encoders._encoder import _weights_hash
from spatial_impute.encoders._pyramids import ENCODERS, build_pyramid
from spatial_impute.models._directory import load_directory, load_params, reading, require_shapes, save_directory
from spatial_impute.models._params import PixNetParams
from spatial_impute.models.pixnet._fit import context_px, make_tiling
from spatial_impute.models.pixnet._network import PixNetNetwork, Stain, receptive_halo
from spatial_impute.models.pixnet._tiles import Slide, TileIndex, iter_sums

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from spatial_impute._image.levels import Level
    from spatial_impute._image.resampling import ResampledImage, SlideOverview
    from spatial_impute.models._directory import Config
    from spatial_impute.models.pixnet._region_weights import Regions
    from spatial_impute.models.pixnet._tiles import Tiling


@dataclass(frozen=True)
class RegionValues:
    """Prediction at regions."""

    expression: np.ndarray
    """(n, n_genes) float32; NaN where a region has no pixel on the image."""
    n_pixels: np.ndarray
    """(n,) pixels of the region on the image, at the resolution of the model."""


class PixNetModel:
    """A fitted PixNet; made by :func:`~spatial_impute.tl.fit_pixnet` or :meth:`load`.

    Attributes
    ----------
    params
        Settings.
    var_names
        Genes.
    history
        Loss, loss and per-gene correlation on the held-out regions by step; ``kept`` marks the step that is used. Step 0
        is the linear base alone.
    predictability
        Pearson correlation per gene on held-out regions of the training slides.
    config
        ``encoder``, ``resolution`` (um per pixel), ``units``, ``aggregate`` (``"mean"`` or ``"sum"``), stain of the
        training slides, and provenance.
    network
        The :class:`torch.nn.Module`: RGB to features to genes.

    Examples
    --------
    >>> import spatial_impute as si
    >>> model = si.tl.fit_pixnet(sdata, "s1_image", "s1_spots")  # doctest: +SKIP
    >>> model.save("pixnet")  # doctest: +SKIP
    >>> model = si.models.PixNetModel.load("pixnet")  # doctest: +SKIP
    >>> si.tl.predict_regions(sdata, "s0_spots", model)  # doctest: +SKIP
    """

    def __init__(
        self,
        network: PixNetNetwork,
        *,
        params: PixNetParams,
        var_names: Sequence[str],
        history: pd.DataFrame,
        predictability: pd.Series,
        config: dict[str, Any],
    ) -> None:
        self.network = network.eval()
        self.params = params
        self.var_names = list(var_names)
        self.history = history
        self.predictability = predictability
        self.config = config

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
        """Pixels of context around a tile with which it equals the whole slide; measured on the network."""
        return receptive_halo(self.network)

    @cached_property
    def identity(self) -> str:
        """Hash of the weights, by which maps know their model."""
        return _weights_hash(self.network)

    def gene_index(self, genes: Sequence[str] | None) -> list[int]:
        """Positions of `genes`; all by default.

        Raises
        ------
        KeyError
            For genes the model does not predict.
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

    def _image(self, levels: list[Level]) -> ResampledImage:
        return resampled_image(levels, self.config["resolution"])

    def _stain(self, found: SlideOverview) -> Stain:
        """Stain of a slide, brought to that of the training slides."""
        return match_stain(found, self.config["stain_density"] if self.params.match_stain else None)

    def _tiling(self, shape: tuple[int, int], core: int) -> Tiling:
        return make_tiling(self.network, shape, core, self.halo)

    def _n_tiles(self, image: ResampledImage, regions: Regions, core: int) -> int:
        """Tiles that regions (in working pixels) touch."""
        return len(TileIndex(regions, self._tiling(image.shape, core)))

    def _read_regions(
        self,
        image: ResampledImage,
        stain: Stain,
        regions: Regions,
        index: list[int],
        *,
        core: int,
        on_tile: Callable[[], None] = lambda: None,
        out: np.ndarray | None = None,
    ) -> RegionValues:
        """Values at regions in working pixels, straight from the decoder's cells; into `out` if given."""
        network = self.network.with_genes(index)
        linear = not network.rates
        # The head is linear: it acts on the few features of a region, not on every cell. A rate is not.
        stage = network.features if linear else lambda rgb: network.genes(network.features(rgb))
        slide = Slide(image, stain, self._tiling(image.shape, core))
        pixel_area = abs(np.linalg.det(image.to_um[:2, :2]))
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
        return RegionValues(values, n_pixels)

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
            "history": self.history.astype(object).where(self.history.notna(), None).to_dict(orient="list"),
            "predictability": [None if np.isnan(r) else float(r) for r in self.predictability],
            "config": self.config,
        }
        tensors = {key: value.detach().cpu() for key, value in self.network.state_dict().items()}
        save_directory(path, kind=type(self).__name__, config=config, tensors=tensors, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path, *, encoder: nn.Module | None = None) -> PixNetModel:
        """Read a model written by :meth:`save`.

        Parameters
        ----------
        path
            The directory.
        encoder
            Module of the encoder's architecture, if the model was fitted with a module of yours; its weights are read
            from the directory.

        Raises
        ------
        FileNotFoundError
            If a file is missing.
        ValueError
            If the directory holds something else, weights that do not fit the configuration, or a model with an encoder
            of yours and none is passed.
        """
        config, tensors = load_directory(path, kind=cls.__name__)
        with reading(path):
            return cls._from_config(path, config, tensors, encoder)

    @classmethod
    def _from_config(
        cls, path: str | Path, config: Config, tensors: dict[str, Tensor], encoder: nn.Module | None
    ) -> PixNetModel:
        name = config["config"]["encoder"]
        if encoder is None and name not in ENCODERS:
            msg = f"The model in {str(path)!r} has the encoder {name!r}; pass a module of this architecture as `encoder=`."
            raise ValueError(msg)
        params = load_params(PixNetParams, config)
        pyramid = build_pyramid(name, pretrained=False) if encoder is None else build_pyramid(encoder)

        def build() -> PixNetNetwork:
            return PixNetNetwork(
                pyramid,
                n_genes=len(config["var_names"]),
                width=params.width,
                n_base=config["n_base"],
                context=context_px(params, config["config"]["resolution"]),
                norm=params.norm,
                finest=params.finest_stride,
                rates=config["rates"],
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
            config=config["config"],
        )
        repr(model)  # shows encoder, resolution and score, so they are there
        return model


def match_stain(found: SlideOverview, reference: Sequence[float] | None) -> Stain:
    """Stain of a slide on white glass, with the reference's mean optical density if there is one."""
    if reference is None:
        return Stain(found.background)
    return Stain(found.background, tuple(float(r / d) for r, d in zip(reference, found.density, strict=True)))
