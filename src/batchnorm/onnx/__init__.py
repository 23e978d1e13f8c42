"""The wing for ONNX: files, and the view of a model that the verbs ask for."""
