"""What recipes that train need of torch: an ONNX graph as a module (``importing``), its weights
back in the graph (``exporting``), and training against a parent's answers (``training``)."""
