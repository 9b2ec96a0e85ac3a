"""The words of the command line: what TEACHER and DATA may be, and the error for what they may not."""

TEACHER_HELP = "hf:DIR (a transformers directory), or package.module:function returning an nn.Module"
DATA_HELP = (
    "digits; text:PATH or images:DIR (read by the tokenizer or image processor of a teacher hf:DIR); or "
    "package.module:function returning (train, val), (train, val, test), a mapping with these keys, or one iterable of batches"
)
OVERWRITE_HELP = "let --out replace an earlier result of inhernet (never anything else)"


class UsageError(ValueError):
    """A wrong argument of the command line: one sentence, exit status 2."""
