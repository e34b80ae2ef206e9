"""What `--model` takes, for --help and for errors."""

MODEL_HELP = (
    "A model: example:NAME (digits-cnn, normalizer, …), file.py:function or package.module:function that returns a ModelSpec or "
    "(module, example_inputs), a .pt2 or .tflite file, or a Hugging Face folder or id."
)
