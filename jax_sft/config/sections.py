"""The sections of a run's configuration, frozen: what may be said, of what type, and what holds if nothing is said.

Defaults live here and nowhere else.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

NewRowsStart = Literal["mean", "zeros", "sample"]
# What a rule does with a conversation that it finds: nothing (and is not looked for), count it, leave it out.
Rule = Literal["off", "note", "drop"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where the base model comes from and how it computes."""

    path: str = ""  # a Hugging Face folder, a hub id, or a .gguf file
    revision: str | None = None  # branch, tag or commit of a hub id
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation; trained weights stay float32
    chat_template: str | None = None  # replaces the tokenizer's own: one of TEMPLATES, or a Jinja file
    new_tokens: tuple[str, ...] = ()  # control tokens to add to the vocabulary
    new_rows: NewRowsStart = "mean"  # how their rows start; sample: drawn with the others' mean and deviation, by seed
    vocab_multiple: int = 128  # embedding and head are padded to it in training, so that mesh axes divide them
    attention: Literal["auto", "xla", "chunked"] = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters beside a frozen base, instead of training all of it."""

    rank: int = 0  # 0: no adapters, full fine-tuning
    alpha: float | None = None  # what adapters say counts alpha / rank times; None: twice the rank
    dropout: float | None = None  # of what goes into them; None: none, or what lora.adapter says
    # Kinds (all-linear, attention, mlp, experts, embeddings, head) or module names as in the Hugging Face folder:
    # "q_proj", "self_attn", a regular expression.
    targets: tuple[str, ...] = ("all-linear",)
    layers: str | None = None  # such as "0-3,20-27"; None: all
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)  # other ranks, by module name
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rslora: bool = False  # alpha / sqrt(rank) instead (arXiv 2312.03732)
    dora: bool = False  # magnitude and direction apart (arXiv 2402.09353)
    start: Literal["default", "pissa"] = "default"  # pissa: from the largest singular values (arXiv 2404.02948)
    b_lr_ratio: float = 1.0  # B learns this many times as fast as A, but of embeddings (LoRA+, arXiv 2402.12354)
    modules_to_save: tuple[str, ...] = ()  # also trained, in full: embeddings, head, norms or module names
    base: Literal["float32", "bfloat16", "int8", "nf4"] = "bfloat16"  # how the frozen weights are held
    adapter: str | None = None  # a folder in PEFT's format to go on from; it says rank, alpha, targets and the like


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetConfig:
    """A named set of a mixture: its files, and how much of it is drawn in an epoch."""

    paths: tuple[str, ...] = ()  # as data.train
    # How many conversations an epoch draws of it: one of these three, or else all of them once. A set goes on where the
    # last epoch left it, so that none is drawn twice before all have been drawn once.
    weight: float | None = None  # share of what all sets hold together, against the other sets' weights
    count: int | None = None  # so many
    epochs: float | None = None  # so many passes over it, or a part of one
    cap: int | None = None  # no more conversations than this are ever drawn, chosen by the seed
    loss_weight: float = 1.0  # its tokens' weight in the loss, times that of their message
    template_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # over data.template_args


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A part of the training with its own mixture, length and learning rate; the next one goes on where it ends."""

    name: str = ""
    steps: int | None = None  # exactly one of steps and epochs
    epochs: float | None = None
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)  # set -> weight; empty: as data.sets says
    lr: float | None = None  # None: optim.lr; each stage has a schedule of its own, with optim.warmup_steps
    # Easy ones first: short ones, those of few answers, or those of the lowest loss in data.quality.scores
    order: Literal["random", "length", "answers", "score"] = "random"
    start: Literal["last", "best"] = "last"  # from the last step of the stage before, or its lowest validation loss


# Rules of a conversation against others, or against prompts that must not be trained on.
RULES_OF_ALL = ("leakage", "same_content", "same_id", "same_prompt", "near_duplicate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """What is looked for in the conversations before they become tokens; the rules are tried in this order."""

    # Rules of one conversation; by default the cheap and certain ones count what they find, and nothing is left out.
    roles: Rule = (
        "note"  # two user turns in a row, an answer first, a system message in the middle, no answer at the end
    )
    empty_answer: Rule = "note"  # nothing but space, dots or "null"
    repeats_prompt: Rule = "note"  # the answer is the prompt, or begins with all of it
    mojibake: Rule = "note"  # text that was decoded with a wrong encoding
    cut_off: Rule = "off"  # the answer ends in the middle of a sentence, a code fence or JSON
    loops: Rule = "off"  # the answer says the same over and over
    markup: Rule = "off"  # HTML tags and entities outside code, where the prompt is not about them
    boilerplate: Rule = "off"  # what web pages have around their text: "Click here", cookie banners, "Read more"
    refusal: Rule = "off"  # "As an AI language model, I cannot ..."
    wrong_language: Rule = "off"  # the answer is in another language than the prompt, which asks for none
    language_by: Literal["script", "model"] = (
        "script"  # model: py3langid, which also tells languages of one script apart
    )
    length: Rule = "note"  # outside of the bounds that follow; without one, nothing is
    min_answer_characters: int | None = None  # of all answers of a conversation together, or of a plain text
    max_answer_characters: int | None = None
    max_length_deviation: float | None = None  # robust deviations of log bytes from the median of the first 2,000
    personal_data: Literal["off", "note", "drop", "mask"] = "off"  # mask: <EMAIL>, <PHONE>, ... stand in its place
    # Which: email, phone, us_ssn, cn_id, uk_nino, de_tax_id, fr_insee, es_dni, br_cpf, card, iban, ipv4; empty: all
    personal_kinds: tuple[str, ...] = ()
    words: Rule = "note"  # of the lists that follow
    word_lists: tuple[str, ...] = ()  # text files, a word or phrase a line, # before a comment
    score: Rule = "note"  # outside of the bounds that follow, by the file `scores`
    scores: str | None = None  # JSON lines of id, loss, loss_without_prompt, ratio: what a model makes of the answers
    min_ratio: float | None = None  # of the answer's loss with its prompt to that without it
    max_ratio: float | None = None
    max_loss: float | None = None
    # Rules of one conversation against others. Only leakage looks at what is measured; the others compare training
    # conversations with each other, and the earlier one stays.
    leakage: Rule = "off"  # a prompt of data.validation or of a benchmark is in a conversation that is trained on
    benchmarks: tuple[str, ...] = ()  # files of prompts that must not be trained on
    leakage_words: int = 13  # a run of so many words in common counts (arXiv 2005.14165); shorter prompts in whole
    leakage_characters: int = 20  # the same in Chinese, Japanese and Korean
    leakage_share: float = 0.5  # of the runs of a prompt that must be found
    same_content: Rule = "note"  # as an earlier conversation
    same_id: Rule = "note"
    same_prompt: Rule = "off"  # with another answer
    near_duplicate: Rule = "off"  # by MinHash of shingles
    near_duplicate_similarity: float = 0.8  # Jaccard similarity of the shingles


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """Training files read while training, for sets too large to be tokenised first."""

    on: bool = False
    block: int = 256  # conversations that are shuffled and packed with each other; each row of the batch has its own
    unit_bytes: int = 8 * 2**20  # of a file that are read in one go, the next from elsewhere; Parquet: its row groups
    predicted: int | None = None  # positions of a row that may be trained (P); None: all of data.max_length
    unreadable: Literal["stop", "skip"] = "stop"  # what a torn shard or a broken line does; skip: and count


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, how it is rendered, which tokens teach."""

    train: tuple[str, ...] = ()  # files, globs, folders or hub dataset ids
    sets: Mapping[str, SetConfig] = dataclasses.field(default_factory=dict)  # instead of train: a mixture, by name
    temperature: float | None = None  # weights of the sets are their sizes ** (1 / temperature)
    validation: tuple[str, ...] = ()
    validation_sets: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # or several, by name
    holdout: float = 0.0  # share of the prompts of the training files that goes to validation, whatever else is there
    format: Literal[
        "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "preference", "squad", "tokens", "text"
    ] = "auto"
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)  # our field -> the column's name in the files
    header: bool = True  # whether tables have one; without it, columns are called "0", "1" and so on
    quoted: bool = True  # whether a quote in a table opens a field that may hold separators; if not, it is a letter
    split: str = "train"  # of a hub dataset
    max_length: int = 2048  # tokens in a packed row, and the longest sequence
    packing: bool = True
    too_long: Literal["drop", "truncate", "error"] = "drop"
    train_on: str = "assistant"  # roles that teach, separated by commas
    train_turns: Literal["all", "last"] = "all"
    mask: Literal["auto", "tags", "prefix", "sentinel", "turns"] = "auto"  # how trained spans are found
    # For the chat template, such as {"enable_thinking": False}; a set may say otherwise, or a row: chat_template_kwargs
    template_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    control_text: Literal["plain", "drop"] = "plain"  # control tokens written out in a message: text, or no such row
    quality: QualityConfig = QualityConfig()
    # What the data card says word for word: name, licence, origin, intended_use, must_not_be_used_for, or other fields
    card: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # processes that tokenise; 0: this one; None: this one, and for what a large set has left, one for each core
    workers: int | None = None
    cache: str | None = None  # folder of tokenised sets; None: beside the workdir
    stream: StreamConfig = StreamConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how much at once."""

    batch_size: int = 8  # packed rows in one optimizer step, over all devices and micro-batches
    accumulation: int = 1  # micro-batches an optimizer step is cut into
    epochs: float | None = None  # passes over the training set; exactly one of epochs and steps
    steps: int | None = None
    remat: Literal["none", "dots", "full", "offload"] = "dots"
    nonfinite: Literal["stop", "skip"] = "stop"  # what a loss or gradient that is not finite does
    loss_chunk_tokens: int = 1024  # predicted tokens whose logits exist at one time
    # Against forgetting: so many times KL(base || model) of each trained token is added to its loss, as in "Learning
    # without Forgetting" (arXiv 1606.09282). The base's forward pass costs a third of a step, and full fine-tuning a
    # copy of the base in model.dtype.
    base_kl: float = 0.0
    # Evaluated and exported is a moving average of the weights, in float32: of n steps it keeps this much at each, or
    # less in the beginning, (1 + n) / (10 + n); such as 0.99; None: the weights themselves
    ema_decay: float | None = None
    freeze: tuple[str, ...] = ()  # what full fine-tuning leaves alone: kinds or module names, as lora.targets

    @property
    def is_averaged(self) -> bool:
        """Whether a moving average of the weights is kept."""
        return self.ema_decay is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning rate."""

    name: Literal["adamw"] = "adamw"
    # None: 1e-5, and with adapters 1e-4, for their best rate is about ten times that of full fine-tuning whatever the
    # model and the rank ("LoRA Without Regret", Schulman and Thinking Machines 2025)
    lr: float | None = None
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: int = 0
    final_lr_ratio: float = 0.1  # the schedule ends at lr times this
    decay_steps: int | None = None  # of wsd: the steps of its last part; None: a fifth of the run
    weight_decay: float = 0.0
    # Against forgetting: as weight_decay, but towards the base's weights and of all of them (L2-SP, arXiv 1802.01483)
    decay_to_base: float = 0.0
    clip_norm: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices by axis; one of them may be -1 and takes what is left."""

    data: int = 1
    fsdp: int = -1
    expert: int = 1  # experts are spread over it, and rows too
    tensor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class LevelConfig:
    """From where on one is told, and from where on the training ends; None: never."""

    alarm: float | None = None
    stop: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForgettingConfig:
    """How far the model may go from what it was before its first step."""

    # Passages that it should still find as likely as before: "own" ones, or a .jsonl (field `text`) or .txt of yours;
    # None: not measured
    texts: str | None = None
    every_steps: int | None = None  # a multiple of evaluate.every_steps; None: at every evaluation
    task_batches: int = 4  # of the validation set, whose answers are compared too; 0: none
    loss_rise: LevelConfig = LevelConfig(alarm=0.2)  # nats a token of general text, above it
    kl: LevelConfig = LevelConfig(alarm=0.3)  # KL(base || model), nats a token, above it
    agreement: LevelConfig = LevelConfig(alarm=0.7)  # share of tokens that both find the likeliest, below it

    @property
    def may_stop(self) -> bool:
        """Whether there is a level that ends the training."""
        return any(level.stop is not None for level in (self.loss_rise, self.kl, self.agreement))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Validation and sample answers during training."""

    every_steps: int | None = None  # None: at the start and the end alone
    # What decides which step is the best: a validation set, by its loss, or a name of metrics.jsonl such as
    # "metric/validation/f1" or "probes/answers"; None: the loss on all validation sets together
    best: str | None = None
    patience: int | None = None  # the training ends after so many evaluations in a row without a better step
    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 64
    probes: str | None = None  # does it answer or continue, stop, keep its role: "own" prompts, or a file of yours
    rules: str | None = None  # instructions that a program checks: "own" prompts, or a file such as IFEval's
    metrics: tuple[str, ...] = ()  # of answers to the validation sets against their own: f1, chrf, ...
    metric_rows: int = 64  # of each validation set, the first ones
    run_code: bool = False  # unsafe: metric pass_at_1 runs what the model wrote
    behaviour_every_steps: int | None = None  # probes, rules, metrics; None: untrained, and what is exported
    # An alarm when the validation loss is so much (relative) above its lowest while the training loss fell; None: never
    overfitting_rise: float | None = 0.02
    forgetting: ForgettingConfig = ForgettingConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved and how many saves are kept; the best by validation loss is kept beside them."""

    every_steps: int = 500
    keep: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while training."""

    every_steps: int = 1
    tensorboard: bool = True
    wandb_project: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The Hugging Face folder at the end."""

    format: Literal["full", "merged", "adapter"] | None = None  # None: adapter if there are adapters, else full
    # Of the last step, or of that with the lowest validation loss; None: with evaluate.patience or a stop level of
    # evaluate.forgetting the best, else the last
    weights: Literal["last", "best"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # None: bfloat16, and of adapters float32
    max_shard_size: str = "5GB"
    certify: bool = True  # read the folder back, compare logits, answer once; CERTIFICATE.json
    push_to: str | None = None  # the hub's name, org/name, that the folder is pushed to when a training has ended
    push_private: bool = False  # nobody else may see it there


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run."""

    seed: int = 0
    workdir: str = ""
    model: ModelSource = ModelSource()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    stages: tuple[StageConfig, ...] = ()  # instead of train.steps and train.epochs: simple before hard
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    export: ExportConfig = ExportConfig()

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, ready for JSON."""
        return dataclasses.asdict(self)
