"""Pair scores of other papers over the same regions and words, trained by the same loop, beside TVRN in one table.

    python examples/baselines/peers.py --output runs/peers data=flickr8k 'regions=regions/{split}' seed=0

trains each of these scores (`--scores vse,saf,tvrn`: some of them) into a folder of its own, leaves alone what is
there already, and compares all on the validation split: recalls with paired intervals, costs. Keys are those of
`tvrn train`, laid over the recipe flickr8k (`--config`); every score learns alone, as published, with embeddings
beside it for shortlists: no first stage, no late interaction. The regions' caches: see examples/configs/flickr8k.yaml.

- vse: VSE∞ (Chen et al., CVPR 2021), a dual encoder whose pooling is learned (GPO)
- saf, sgr: the two halves of SGRAF (Diao et al., AAAI 2021)
- imram: Full-IMRAM (Chen et al., CVPR 2020), three steps of attention both ways with a gated memory, whose matrices
  apply to every word and region of every pair: by far the most expensive of them
- tvrn: its reasoning alone, all modules on, with gates (`--scores tvrn model.refinement=gru`: recurrent, as published)

Written from the papers. What differs from them: regions and words are encoded as TVRN's (normalised before any
pooling), nothing has batch statistics (SGRAF has BatchNorm, with which a score would depend on its batch), and cosines
have a learned scale, since the loss is InfoNCE as in the recipe; `model.pair_contrastive_loss_weight=0
model.hardest_negative_loss_weight=1` is the papers' hinge, which wants a start from something that has learned.
"""

import argparse
import logging
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeling_tvrn import TVRNConfig, TVRNModel, TVRNProcessor
from modeling_tvrn.cli.common import prepare_terminal, progress
from modeling_tvrn.data import load_pairs
from modeling_tvrn.encoded_tvrn import EncodedImages, EncodedTexts
from modeling_tvrn.evaluation import compare
from modeling_tvrn.layers_tvrn import AttentionPooling, gram, masked_softmax, normalize
from modeling_tvrn.pair_tvrn import PairStage, SimilarityAttention
from modeling_tvrn.redaction import guard_logs, redacted_text
from modeling_tvrn.teachers import with_checked_regions
from modeling_tvrn.training import TrainingConfig, TrainingStopped, train

# The paper's modules, and what a peer has none of.
MODULES = ("use_geometric_context", "use_text_refinement", "use_semantic_alignment")
ABSENT = ("use_late_interaction", "use_refined_features", *MODULES)
POSITION_SIZE, POOLING_SIZE, POOLING_TEMPERATURE = 32, 32, 0.1  # of VSE∞
MEMORY_STEPS = 3  # of IMRAM


class PeerStage(PairStage):
    """A pair stage that reads regions and words as they are encoded; `forward` is its logit for every pair."""

    reads_word_weights: ClassVar[bool] = False

    def prepare_images(self, images: EncodedImages) -> EncodedImages:
        """What is computed once an image, of its `embeds`, `regions` (I, R, D) and `region_mask`."""
        return replace(images, regions=None, refined_regions=images.regions, refined_region_mask=images.region_mask)

    def prepare_texts(self, texts: EncodedTexts) -> EncodedTexts:
        """What is computed once a text."""
        return texts


class PeerModel(TVRNModel):
    """A TVRN whose reasoning is another paper's. Its folder loads with the same class alone."""

    _auto_class = None
    stage: ClassVar[type[PeerStage]]

    def __init__(self, config: TVRNConfig):
        given = [name for name in ABSENT if getattr(config, name)]
        if given or not config.use_reasoning:
            raise ValueError(
                f"{type(self).__name__} takes the place of the reasoning and has none of TVRN's modules: expected "
                f"use_reasoning=True (here {config.use_reasoning}), and {', '.join(given or ABSENT)} to be False."
            )
        super().__init__(config)
        self.attention = self.visual_refinement = self.image_pooling = None
        self.pair = self.stage(config)
        self.pair.apply(self._init_weights)

    def _freeze(self) -> None:
        super()._freeze()
        self.text_pooling.requires_grad_(self.stage.reads_word_weights)

    def _encode_regions(
        self, features: Tensor, boxes: Tensor | None, mask: Tensor, embeds: Tensor | None, level: str = "full"
    ) -> EncodedImages:
        if level != "full":
            return super()._encode_regions(features, boxes, mask, embeds, level)
        return self.pair.prepare_images(super()._encode_regions(features, boxes, mask, embeds, "late_interaction"))

    def _encode_words(
        self, words: Tensor, mask: Tensor, positions: Tensor, pooled: Tensor, level: str = "full"
    ) -> EncodedTexts:
        texts = super()._encode_words(words, mask, positions, pooled, level)
        return self.pair.prepare_texts(texts) if level == "full" else texts


# -- VSE∞ ------------------------------------------------------------------------------------------------------------


class GeneralizedPooling(nn.Module):
    """GPO: each feature's values in descending order, weighted by their ranks: Σ_k θ_k(N) · (k-th largest of N).

    θ is the softmax of what a BiGRU makes of the ranks' sinusoidal encodings, so it depends on the number N alone; the
    mean, the maximum and all between are among what it can be.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(POSITION_SIZE, POOLING_SIZE, batch_first=True, bidirectional=True)
        self.score = nn.Linear(POOLING_SIZE, 1, bias=False)

    def weights(self, counts: Tensor, length: int) -> Tensor:
        """θ for each number of fragments: (n,) -> (n, length), 0 beyond the number."""
        ranks = torch.arange(length, device=counts.device, dtype=self.score.weight.dtype)
        steps = torch.arange(0, POSITION_SIZE, 2, device=counts.device, dtype=ranks.dtype)
        angles = ranks[:, None] * torch.exp(steps * (-math.log(10000.0) / POSITION_SIZE))
        # Sines at even places, cosines at odd ones.
        encoded = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).expand(len(counts), -1, -1)
        packed = nn.utils.rnn.pack_padded_sequence(encoded, counts.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=length)
        forward, backward = states.chunk(2, dim=-1)
        scores = self.score((forward + backward) / 2).squeeze(-1) / POOLING_TEMPERATURE
        return masked_softmax(scores, ranks < counts[:, None], dim=-1)

    def forward(self, fragments: Tensor, mask: Tensor) -> Tensor:
        """(B, N, D), (B, N) -> (B, D) of unit norm."""
        counts, own = mask.sum(dim=1).unique(return_inverse=True)
        weights = self.weights(counts, mask.shape[1])[own].to(fragments.dtype)
        ordered = fragments.masked_fill(~mask.unsqueeze(-1), -torch.inf).sort(dim=1, descending=True).values
        # What was padding now comes last in every feature, where weights are 0; 0 · −∞ would be NaN.
        ordered = ordered.masked_fill((weights == 0).unsqueeze(-1), 0.0)
        return normalize((weights.unsqueeze(1) @ ordered).squeeze(1))


class VSEInfinityStage(PeerStage):
    """e^s · cosine of the pooled regions and the pooled words, each of which is encoded as a single fragment."""

    def __init__(self, config: TVRNConfig):
        super().__init__(config)
        del self.local_similarity, self.global_similarity, self.head
        self.region_pooling, self.word_pooling = GeneralizedPooling(), GeneralizedPooling()
        self.scale = nn.Parameter(torch.full((1,), float(config.logit_scale_init_value)))

    def prepare_images(self, images: EncodedImages) -> EncodedImages:
        assert images.regions is not None and images.region_mask is not None
        pooled = self.region_pooling(images.regions, images.region_mask).unsqueeze(1)
        return super().prepare_images(replace(images, regions=pooled, region_mask=images.region_mask[:, :1]))

    def prepare_texts(self, texts: EncodedTexts) -> EncodedTexts:
        # Valid words come first, so the first column of every mask is True.
        first = {name: value[:, :1] for name, value in texts.tensors().items() if name.startswith("word_")}
        return replace(texts, words=self.word_pooling(texts.words, texts.word_mask).unsqueeze(1), **first)

    def forward(self, images: EncodedImages, texts: EncodedTexts, attention: Any, refinement: Any) -> Tensor:
        assert images.refined_regions is not None and texts.words is not None
        return self.scale.exp() * self.cosines(images.refined_regions.squeeze(1), texts.words.squeeze(-2))


# -- SGRAF -----------------------------------------------------------------------------------------------------------


class SimilarityFiltration(SimilarityAttention):
    """SAF as published: the gated sum of the similarity vectors is normalised before the logit is read from it."""

    def forward(self, nodes: Tensor, weights: Tensor) -> Tensor:
        gates, _ = self.parts(nodes, weights)
        kept = normalize((gates.unsqueeze(1).to(nodes.dtype) @ nodes).squeeze(1))
        return self.logit(kept).squeeze(-1).to(weights.dtype)


class SGRAFStage(PeerStage):
    """Similarity vectors of the words with what they attend to, and of the global vectors, through SGR or SAF."""

    reads_word_weights = True

    def __init__(self, config: TVRNConfig):
        super().__init__(config)
        self.image_pooling = AttentionPooling(config)
        if config.similarity_head == "saf":
            self.head = SimilarityFiltration(config)

    def prepare_images(self, images: EncodedImages) -> EncodedImages:
        assert images.regions is not None and images.region_mask is not None
        weights = self.image_pooling(images.regions, images.region_mask).unsqueeze(1)
        return replace(
            super().prepare_images(images),
            global_vector=normalize((weights @ images.regions).squeeze(1)),
            refined_region_saliency=torch.zeros_like(weights.squeeze(1)),
            refined_region_gram=gram(images.regions),
        )

    def forward(self, images: EncodedImages, texts: EncodedTexts, attention: Any, refinement: Any) -> Tensor:
        assert texts.word_mask is not None
        # TVRN's own nodes without its modules are SGRAF's: words as they are, regions as they are, no saliency.
        nodes, weights = self.nodes(images, texts, attention, refinement)
        return self.head(nodes, weights).view(len(images), texts.word_mask.shape[-2])


# -- IMRAM -----------------------------------------------------------------------------------------------------------


class GatedMemory(nn.Module):
    """What a fragment asks for next: g ∘ x + (1 − g) ∘ o, with g = σ(W_g [x; c] + b_g), o = tanh(W_o [x; c] + b_o)."""

    def __init__(self, size: int):
        super().__init__()
        self.gate = nn.Linear(2 * size, size)
        self.update = nn.Linear(2 * size, size)

    def forward(self, fragments: Tensor, contexts: Tensor) -> Tensor:
        both = torch.cat([fragments, contexts], dim=-1)
        gate = torch.sigmoid(self.gate(both))
        return normalize(gate * fragments + (1 - gate) * torch.tanh(self.update(both)))


class IMRAMStage(PeerStage):
    """e^s · the mean, over steps, directions and fragments, of a fragment's cosine with what it attends to."""

    def __init__(self, config: TVRNConfig):
        super().__init__(config)
        del self.local_similarity, self.global_similarity, self.head
        self.word_memory, self.region_memory = GatedMemory(config.hidden_size), GatedMemory(config.hidden_size)
        self.scale = nn.Parameter(torch.full((1,), float(config.logit_scale_init_value)))

    def forward(self, images: EncodedImages, texts: EncodedTexts, attention: Any, refinement: Any) -> Tensor:
        assert images.refined_regions is not None and images.region_mask is not None
        assert texts.words is not None and texts.word_mask is not None
        # Every image with every caption: (i, 1, R, D) and (1, t, W, D), or (i, t, W, D) where each has its own.
        regions = images.refined_regions.unsqueeze(1), images.region_mask.unsqueeze(1)
        words = texts.words, texts.word_mask
        if texts.words.ndim == 3:
            words = texts.words.unsqueeze(0), texts.word_mask.unsqueeze(0)
        both = self.direction(*words, *regions, self.word_memory) + self.direction(
            *regions, *words, self.region_memory
        )
        return self.scale.exp() * both / 2

    def direction(
        self, fragments: Tensor, mask: Tensor, sources: Tensor, source_mask: Tensor, memory: GatedMemory
    ) -> Tensor:
        """Mean over steps and fragments (…, N, D) of cosines with contexts from the sources (…, M, D): (i, t)."""
        queries, found = fragments, []
        for step in range(MEMORY_STEPS):
            cosine = F.relu(queries @ sources.transpose(-1, -2)).masked_fill(~mask.unsqueeze(-1), 0.0)
            # Of each source over the fragments that ask (dim −2), then of each fragment over the sources (dim −1).
            weights = masked_softmax(
                self.config.attention_scale * normalize(cosine, dim=-2), source_mask.unsqueeze(-2), dim=-1
            )
            contexts = normalize(weights.to(sources.dtype) @ sources)
            # With the fragment as it was: the memory changes what is asked for, not what it is compared with.
            agreement = (fragments * contexts).sum(dim=-1, dtype=weights.dtype).masked_fill(~mask, 0.0)
            found.append(agreement.sum(dim=-1) / mask.sum(dim=-1))
            if step < MEMORY_STEPS - 1:
                queries = memory(queries.expand(contexts.shape), contexts)
        return torch.stack(found).mean(dim=0)


class VSEInfinity(PeerModel):
    stage = VSEInfinityStage


class SGRAF(PeerModel):
    stage = SGRAFStage


class IMRAM(PeerModel):
    stage = IMRAMStage


PEER = dict.fromkeys(("use_first_stage", *ABSENT), False)
SCORES: dict[str, tuple[type[TVRNModel], dict[str, Any]]] = {
    "vse": (VSEInfinity, PEER),
    "saf": (SGRAF, PEER | {"similarity_head": "saf"}),
    "sgr": (SGRAF, PEER | {"similarity_head": "sgr"}),
    "imram": (IMRAM, PEER | {"checkpoint_pair_chunks": True}),  # or a batch's contexts take gigabytes
    "tvrn": (TVRNModel, PEER | dict.fromkeys(MODULES, True)),
}


# -- the program -----------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", default=",".join(SCORES), metavar="NAMES", help="joined by commas (default: all)")
    parser.add_argument("--config", default="flickr8k", metavar="NAME|FILE", help="recipe (default: flickr8k)")
    parser.add_argument("--output", type=Path, default=Path("runs/peers"), metavar="FOLDER")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--shortlist-size", type=int, metavar="K", help="compare by reranking K candidates a query")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as of tvrn train")
    return parser.parse_intermixed_args(arguments)


def configured(options: argparse.Namespace, score: str) -> TrainingConfig:
    """The recipe with this score in place of its own, in one phase."""
    fields = [f"model.{name}={str(value).lower()}" for name, value in SCORES[score][1].items()]
    phase = f"{{train: [embeddings, reasoning], epochs: {options.epochs}, batch_size: {options.batch_size}}}"
    overrides = [*fields, f"phases=[{phase}]", f"output_dir={options.output / score}", *options.overrides]
    return TrainingConfig.from_yaml(options.config, overrides)


def main(arguments: list[str] | None = None) -> int:
    """Train what is not there yet, and compare."""
    prepare_terminal()
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    guard_logs()
    try:
        scores = options.scores.split(",")
        if unknown := [name for name in scores if name not in SCORES]:
            raise ValueError(f"--scores names {', '.join(map(repr, unknown))}; expected some of {','.join(SCORES)}")
        configs = {score: configured(options, score) for score in scores}
        for score, config in configs.items():
            if not (Path(config.output_dir) / "results.json").is_file():
                train(config, model_class=SCORES[score][0])
                if score != "tvrn":
                    (Path(config.output_dir) / "README.md").unlink()  # the card describes TVRN, which this is not
        config = next(iter(configs.values()))
        folders = {score: each.output_dir for score, each in configs.items()}
        models = [SCORES[score][0].from_pretrained(folder).eval() for score, folder in folders.items()]
        processors = [TVRNProcessor.from_pretrained(folder) for folder in folders.values()]
        records = load_pairs(config.data, config.validation_split, **config.data_options)
        if config.regions is not None:
            cache = config.regions.replace("{split}", config.validation_split)
            records = with_checked_regions(records, cache, models[0], processors[0])
        if len(models) > 1:
            report = compare(
                models,
                processors,
                records,
                list(folders),
                shortlist_size=options.shortlist_size,
                data=config.data,
                progress=progress(),
            )
            report.to_json(options.output / "comparison.json")
            print(report.table())
    except (ValueError, OSError, ImportError) as error:
        print(f"peers.py: {redacted_text(str(error))}", file=sys.stderr)
        return 2
    except TrainingStopped as error:
        print(f"peers.py: {redacted_text(str(error))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
