"""What `--model` takes, for --help and for errors. Imports nothing."""

MODEL_HELP = (
    "A model: example:NAME (digits-cnn, normalizer, …), file.py:function or package.module:function that returns a ModelSpec or "
    "(module, example_inputs), a .pt2 or .tflite file, a .edgec that `edgesdk compress` wrote, a .edgeseq that `edgesdk adapt` or `teach` wrote, or a Hugging Face folder or id; "
    "MODEL::RECIPE is any of them compressed, such as example:normalizer::gptq:bits=4,group=32."
)

OTHER_FILES = {
    ".py": "name the function that makes the model: file.py:function",
    ".pt": "load it in a function of yours and give file.py:function, or save the model with torch.export.save as .pt2",
    ".pth": "load it in a function of yours and give file.py:function, or save the model with torch.export.save as .pt2",
    ".ckpt": "load it in a function of yours and give file.py:function",
    ".bin": "give the folder that holds it and config.json",
    ".safetensors": "give the folder that holds it and config.json",
    ".onnx": "export the PyTorch model with torch.export instead, or convert it to .tflite",
    ".h5": "convert it to .tflite with TensorFlow's converter",
    ".keras": "convert it to .tflite with TensorFlow's converter",
    ".pb": "convert it to .tflite with TensorFlow's converter",
    ".gguf": "give the Hugging Face model that it was made from",
    ".pte": "it is lowered already: give the model that it was made from",
    ".edge": "it is a built bundle: `edgesdk flash` and `edgesdk profile` take it",
}
"""Files that people try which `--model` does not take: suffix → what to do instead."""
