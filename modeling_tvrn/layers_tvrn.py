"""The pieces of TVRN that see one side only: attention over fragments, geometry, refinement, pooling. Shipped.

Masks are boolean with `True` = keep, and valid fragments always come before padding (see `valid_first`). No layer here
has batch statistics.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_tvrn import TVRNConfig

# A grid's IoUs are exactly 0.2 and 0.5: without a slack float32 decides at random whether they reach the threshold.
IOU_SLACK = 1e-4
# Of an image's side: a box without width or height, such as padding's, has no ratio to others.
MIN_BOX_SIZE = 1e-3
BOX_HIDDEN_SIZE = 64


def wide(x: Tensor) -> torch.dtype:
    """The dtype for norms and softmaxes: float32, or float64 where the input is."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product with `x` is computed: that of autocast where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def normalize(x: Tensor, dim: int = -1) -> Tensor:
    """n(x): unit L2 norm along `dim`, zeros stay zeros; the norm is taken in float32, the result is of `x`'s dtype."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide(x)).clamp_min(1e-8)
    if x.dtype == torch.float16:  # in which the floor is 0, and the norm of a long vector infinite
        return (x / norm).to(x.dtype)
    # Cast first: x / norm in float32 would be one more tensor of x's size, twice as wide.
    return x / norm.to(x.dtype)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of the valid rows: (B, N, D), (B, N) -> (B, D)."""
    with torch.autocast(x.device.type, enabled=False):  # which on a GPU, not on a CPU, would sum in float32
        weights = mask.to(x.dtype)
        weights = weights / weights.sum(dim=1, keepdim=True)
        # (B, 1, N) @ (B, N, D). Padding counts 0 times, so it has to be finite: 0 · NaN is NaN.
        return (weights.unsqueeze(1) @ x).squeeze(1)


def masked_softmax(x: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Softmax in float32 (or better) over the valid entries, of which there is at least one; exactly 0 elsewhere."""
    x = x.to(wide(x))
    # Filled in before the softmax: a score multiplied by its mask is 0, which still counts exp(0).
    return x.masked_fill(~mask, torch.finfo(x.dtype).min).softmax(dim=dim)


def gram(x: Tensor) -> Tensor:
    """x xᵀ of every item's fragments in float32 (or better): (B, N, D) -> (B, N, N)."""
    # A context's norm is the root of wᵀ G w, a sum of N² terms of either sign: half precision would be felt in it.
    with torch.autocast(x.device.type, enabled=False):
        return x.to(wide(x)) @ x.to(wide(x)).transpose(1, 2)


def valid_first(mask: Tensor) -> Tensor:
    """Order (B, N) that puts the valid fragments first and keeps their order."""
    return torch.argsort(mask.logical_not().to(torch.uint8), dim=1, stable=True)


def take(x: Tensor, order: Tensor) -> Tensor:
    """Reorder the fragments of every item: (B, N, …), (B, M) -> (B, M, …)."""
    # (B, M) -> (B, M, 1, …) -> (B, M, …): expanded without a copy, one index for all features of a fragment.
    index = order.view(*order.shape, *([1] * (x.ndim - 2))).expand(*order.shape, *x.shape[2:])
    return x.gather(1, index)


def box_iou(boxes: Tensor) -> Tensor:
    """Intersection over union of an image's boxes with each other: (B, R, 4) xyxy -> (B, R, R)."""
    # Each box with each: (B, R, 1, 2) against (B, 1, R, 2).
    low = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    intersection = (high - low).clamp_min(0).prod(dim=-1)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)
    union = area[:, :, None] + area[:, None, :] - intersection
    # Padding's boxes have no area: 0, not 0 / 0.
    return intersection / union.clamp_min(torch.finfo(boxes.dtype).tiny)


def box_geometry(boxes: Tensor) -> Tensor:
    """What a position embedding reads of boxes xyxy in [0, 1]: corners, centre, width and height, (…, 4) -> (…, 8)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([boxes, (low + high) / 2, high - low], dim=-1)


def relative_geometry(boxes: Tensor) -> Tensor:
    """How each box of an image lies to each other: (B, R, 4) -> (B, R, R, 4), [b, i, j] is j as i sees it.

    Offsets of the centres in sizes of i, as sign(x)·log(1 + |x|) (relation networks take log |x|, which tells no left
    from right), and logarithms of the sizes' ratios. Swapping i and j, not mirroring, negates the latter two.
    """
    size = (boxes[..., 2:] - boxes[..., :2]).clamp_min(MIN_BOX_SIZE)
    centre = (boxes[..., 2:] + boxes[..., :2]) / 2
    # (B, 1, R, 2) − (B, R, 1, 2): j in columns.
    offset = (centre.unsqueeze(1) - centre.unsqueeze(2)) / size.unsqueeze(2)
    ratio = (size.unsqueeze(1) / size.unsqueeze(2)).log()
    return torch.cat([offset.sign() * offset.abs().log1p(), ratio], dim=-1)


def grid_boxes(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """Boxes of grid cells, row by row: the 3×3 window of cells around each, clipped; (rows·columns, 4) in [0, 1]."""
    top, left = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    corners = [left - 1, top - 1, left + 2, top + 2]
    sizes = [columns, rows, columns, rows]
    scaled = [(corner.float() / size).clamp(0, 1).flatten() for corner, size in zip(corners, sizes, strict=True)]
    return torch.stack(scaled, dim=-1)


def pool_boxes(feature_map: Tensor, boxes: Tensor) -> Tensor:
    """Mean of a map inside each box, cells counted by the area that the box covers of them.

    This is the exact integral of the piecewise constant map, so a box inside one cell gives that cell's feature.

    Args:
        feature_map: (B, C, h, w).
        boxes: (B, R, 4) xyxy in [0, 1]; a box without area gives zeros.

    Returns:
        (B, R, C).
    """
    rows, columns = feature_map.shape[-2:]
    boxes = boxes.to(torch.promote_types(feature_map.dtype, torch.float32))  # half precision moves a box by a cell
    down = _covered(boxes[..., 1], boxes[..., 3], rows)
    across = _covered(boxes[..., 0], boxes[..., 2], columns)
    weights = (down.unsqueeze(-1) * across.unsqueeze(-2)).flatten(2)
    return weights.to(feature_map.dtype) @ feature_map.flatten(2).transpose(1, 2)


def _covered(low: Tensor, high: Tensor, cells: int) -> Tensor:
    """Share of the interval [low, high] that lies in each of the equal cells of [0, 1]: (..., cells)."""
    edges = torch.arange(cells + 1, device=low.device, dtype=low.dtype) / cells
    overlap = torch.minimum(high.unsqueeze(-1), edges[1:]) - torch.maximum(low.unsqueeze(-1), edges[:-1])
    overlap = overlap.clamp_min(0)
    return overlap / overlap.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(low.dtype).tiny)


class FeatureDropout(nn.Dropout):
    """Dropout that drops the same features of all of an item's fragments: (B, N, F) -> (B, N, F).

    Masks of every fragment's own would cost more random numbers than the projection costs arithmetic.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        # Dropout of ones (B, 1, F) is the mask, divided by 1 − p already.
        return x * super().forward(torch.ones_like(x[:, :1]))


class FragmentAttention(nn.Module):
    """att(q, c): every query attends to the sources; one set of weights serves self-attention and expansion."""

    def __init__(self, config: TVRNConfig):
        super().__init__()
        self.scale = config.attention_scale
        self.slope = config.leaky_slope
        self.key = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def weights(self, scores: Tensor, query_mask: Tensor, source_mask: Tensor) -> Tensor:
        """Attention from affinities: (…, sources, queries) -> the same shape, summing to 1 over the valid sources.

        Each source's affinities are L2-normalised over the *valid* queries first, so padding never shifts them.
        """
        scores = F.leaky_relu(scores.to(wide(scores)), self.slope)
        # Normalised along the queries (last), softmax along the sources (last but one): two different axes.
        scores = normalize(scores.masked_fill(~query_mask.unsqueeze(-2), 0.0))
        return masked_softmax(self.scale * scores, source_mask.unsqueeze(-1), dim=-2)

    def forward(self, fragments: Tensor, mask: Tensor) -> Tensor:
        """Self-attention: (B, N, D), (B, N) -> contexts (B, N, D), unit norm."""
        # Keys on the left: sources are rows and queries columns, as the pair stage has them.
        scores = self.key(fragments) @ self.query(fragments).transpose(1, 2)
        weights = self.weights(scores, mask, mask).to(fragments.dtype)
        # (B, queries, sources) @ (B, sources, D).
        return normalize(weights.transpose(1, 2) @ fragments)


class ZeroLinear(nn.Linear):
    """A linear layer whose weights start at 0."""


class BoxPerceptron(nn.Sequential):
    """Numbers of boxes (…, in) to features (…, out), which are 0 at the start: the model is then the one without."""

    def __init__(self, size: int, out: int):
        super().__init__(nn.Linear(size, BOX_HIDDEN_SIZE), nn.GELU(), ZeroLinear(BOX_HIDDEN_SIZE, out, bias=False))

    def exact(self, boxes: Tensor) -> Tensor:
        """Boxes in the precision that differences of them want: float32, or float64 where the weights are."""
        return boxes.to(torch.promote_types(wide(boxes), wide(cast(Tensor, self[0].weight))))

    def forward(self, numbers: Tensor) -> Tensor:
        """In the weights' precision, rounded only once the numbers were computed."""
        with torch.autocast(numbers.device.type, enabled=False):
            return super().forward(numbers.to(cast(Tensor, self[0].weight).dtype))


class GeometricAttention(nn.Module):
    """n(P v): attention among regions whose boxes overlap."""

    def __init__(self, config: TVRNConfig):
        super().__init__()
        self.scale = config.attention_scale
        self.threshold = config.iou_threshold
        self.key = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.relation = BoxPerceptron(4, 1) if config.use_relative_geometry else None

    def forward(self, regions: Tensor, boxes: Tensor, mask: Tensor) -> Tensor:
        """(B, R, D), (B, R, 4), (B, R) -> (B, R, D), unit norm."""
        cosine = normalize(self.query(regions)) @ normalize(self.key(regions)).transpose(1, 2)
        if self.relation is not None:
            cosine = cosine + self.relation(relative_geometry(self.relation.exact(boxes))).squeeze(-1)
        # A region is its own neighbour, padding too and boxes without an area: no row of the softmax is empty.
        itself = torch.eye(regions.shape[1], dtype=torch.bool, device=regions.device)
        near = (box_iou(boxes) >= self.threshold - IOU_SLACK) & mask.unsqueeze(1) | itself
        weights = masked_softmax(self.scale * cosine, near, dim=-1).to(regions.dtype)
        return normalize(weights @ regions)


class Gate(nn.Module):
    """n(x + σ(A x + B y) ∘ C y): refinement of fragments x by contexts y (`refinement="gate"`)."""

    def __init__(self, config: TVRNConfig):
        super().__init__()
        size = config.hidden_size
        self.own = nn.Linear(size, size, bias=False)
        # B and C side by side: the pair stage applies them to the contexts before pairing.
        self.context = nn.Linear(size, 2 * size, bias=False)

    def forward(self, fragments: Tensor, contexts: Tensor) -> Tensor:
        gate, carried = self.context(contexts).chunk(2, dim=-1)
        return normalize(fragments + torch.sigmoid(self.own(fragments) + gate) * carried)


class Recurrence(nn.Module):
    """n(GRU([x; y]) + [x; x]): refinement by a GRU that reads the fragments, then their contexts.

    The state is carried past padding: the sequence is the valid fragments, then their contexts.
    """

    def __init__(self, config: TVRNConfig):
        super().__init__()
        self.gru = nn.GRU(config.hidden_size, config.hidden_size, batch_first=True)

    def read(self, fragments: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """First half: (B, N, D) -> refined fragments (B, N, D) and the state at the last valid one (B, D)."""
        # Not packed: a GRU that runs forwards shows nothing of the padding behind the last valid fragment.
        outputs, _ = self.gru(fragments)
        last = (mask.sum(dim=1) - 1).clamp_min(0)
        state = outputs[torch.arange(outputs.shape[0], device=outputs.device), last]
        return normalize(outputs + fragments), state

    def input_gates(self, contexts: Tensor) -> Tensor:
        """W_ih y without its bias, (…, D) -> (…, 3D): linear, so it commutes with attention and norm."""
        return F.linear(contexts, cast(Tensor, self.gru.weight_ih_l0))

    def steps(self, input_gates: Tensor, state: Tensor) -> Tensor:
        """GRU over prepared input gates (B, N, 3D) from `state` (B, D) -> (B, N, D); a loop over fragments only."""
        # Written out, since nn.GRU takes no prepared input gates: torch's formula in torch's order of the three gates.
        gates = input_gates + cast(Tensor, self.gru.bias_ih_l0)
        weight, bias = cast(Tensor, self.gru.weight_hh_l0), cast(Tensor, self.gru.bias_hh_l0)
        outputs = []
        for step in range(gates.shape[1]):
            reset_in, update_in, new_in = gates[:, step].chunk(3, dim=-1)
            reset_state, update_state, new_state = F.linear(state, weight, bias).chunk(3, dim=-1)
            update = torch.sigmoid(update_in + update_state)
            # The reset gate is applied behind W_hn h + b_hn, not to h: as in cuDNN, other than in the first paper.
            new = torch.tanh(new_in + torch.sigmoid(reset_in + reset_state) * new_state)
            state = new + update * (state - new)  # (1 − z)·new + z·state with one product less
            outputs.append(state)
        return torch.stack(outputs, dim=1)

    def forward(self, fragments: Tensor, contexts: Tensor, mask: Tensor) -> Tensor:
        """(B, N, D), (B, N, D), (B, N) -> (B, 2N, D)."""
        first, state = self.read(fragments, mask)
        # The state (1, B, D) has to be contiguous: cuDNN takes no view.
        outputs, _ = self.gru(contexts, state.unsqueeze(0).contiguous())
        return torch.cat([first, normalize(outputs + fragments)], dim=1)


class AttentionPooling(nn.Module):
    """Attention of fragments against their mean, LayerNorm where SGRAF has BatchNorm."""

    def __init__(self, config: TVRNConfig):
        super().__init__()
        size = config.hidden_size
        self.local = nn.Sequential(nn.Linear(size, size), nn.LayerNorm(size), nn.Tanh(), nn.Dropout(config.dropout))
        self.overall = nn.Sequential(nn.Linear(size, size), nn.LayerNorm(size), nn.Tanh(), nn.Dropout(config.dropout))
        self.score = nn.Linear(size, 1, bias=False)  # a bias would cancel in the softmax

    def forward(self, fragments: Tensor, mask: Tensor) -> Tensor:
        """Weights of the fragments: (B, N, D), (B, N) -> (B, N), summing to 1 over the valid ones."""
        # (B, 1, D) against each of (B, N, D).
        mean = self.overall(masked_mean(fragments, mask)).unsqueeze(1)
        scores = self.score(self.local(fragments) * mean).squeeze(-1)
        return masked_softmax(scores, mask, dim=-1).to(fragments.dtype)


def perceptron(size: int, hidden: int, out: int, dropout: float) -> nn.Sequential | None:
    """MLP with one hidden GELU layer, what stands beside a linear map (B, size) -> (B, out); None without units."""
    if not hidden:
        return None
    return nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, out))


class PooledEmbedding(nn.Module):
    """Mean input features (B, F) to the embedding space (B, P): W x + b + MLP(x); on both sides."""

    def __init__(self, size: int, dropout: float, config: TVRNConfig):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(size, config.projection_size)
        inside = config.dropout if config.pooled_dropout is None else config.pooled_dropout
        self.perceptron = perceptron(size, config.pooled_hidden_size, config.projection_size, inside)

    def forward(self, x: Tensor) -> Tensor:
        """In the precision of the weights: they cost next to nothing, and cosines differ in what bfloat16 rounds."""
        with torch.autocast(x.device.type, enabled=False):
            x = self.dropout(x.to(self.linear.weight.dtype))
            return self.linear(x) + (self.perceptron(x) if self.perceptron is not None else 0)


class UnimodalHead(nn.Module):
    """Embeddings for comparing items of one modality: LayerNorm and a linear map of the cross-modal ones.

    It reads the embedding, and so whatever that reads: what it learns of the teachers also shapes the features below,
    and a stored gallery of embeddings needs no second one.
    """

    def __init__(self, size: int):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.linear = nn.Linear(size, size)

    def forward(self, embeds: Tensor) -> Tensor:
        """(n, P) unit norm -> (n, P) unit norm."""
        with torch.autocast(embeds.device.type, enabled=False):  # cosines of one modality differ in the third digit
            mapped = self.linear(self.norm(embeds.to(self.linear.weight.dtype)))
        return normalize(mapped.to(embeds.dtype))


class WordEncoder(nn.Module):
    """Word embeddings and a bidirectional GRU whose directions are averaged."""

    def __init__(self, config: TVRNConfig):
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.word_embedding_size, padding_idx=config.pad_token_id)
        self.dropout = FeatureDropout(config.text_dropout)
        self.gru = nn.GRU(config.word_embedding_size, config.hidden_size, batch_first=True, bidirectional=True)

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """(T, W) ids, (T, W) with the valid words first -> words (T, W, D)."""
        # Packed: the direction that runs backwards starts at a caption's last word, not in its padding. The lengths
        # have to be on the CPU.
        packed = nn.utils.rnn.pack_padded_sequence(
            self.dropout(self.embeddings(input_ids)), mask.sum(dim=1).cpu(), batch_first=True, enforce_sorted=False
        )
        outputs, _ = nn.utils.rnn.pad_packed_sequence(
            self.gru(packed)[0], batch_first=True, total_length=input_ids.shape[1]
        )
        forward, backward = outputs.chunk(2, dim=-1)  # of (T, W, 2D)
        return (forward + backward) / 2
