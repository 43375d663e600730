"""Write models/digits/1: a linear classifier of scikit-learn's handwritten digits, as ONNX."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split


def main() -> None:
    """Train, write the model and the data that Cotenant checks it with."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--version", default="1", help="version directory to write (default: 1)")
    version = parser.parse_args().version
    images, labels = load_digits(return_X_y=True)
    x, x_check, y, y_check = train_test_split(images / 16.0, labels, random_state=0)
    fitted = LogisticRegression(max_iter=500).fit(x, y)
    target = Path("models/digits") / version
    # Beside its final place first: Cotenant must never see half a version.
    made = target.with_name(f".{version}.tmp")
    made.mkdir(parents=True)
    weights = numpy_helper.from_array(fitted.coef_.T.astype(np.float32), "weights")
    bias = numpy_helper.from_array(fitted.intercept_.astype(np.float32), "bias")
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["image", "weights"], ["products"]),
            helper.make_node("Add", ["products", "bias"], ["scores"]),
        ],
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 10])],
        [weights, bias],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), made / "model.onnx")
    np.savez(made / "check.npz", image=x_check.astype(np.float32), labels=y_check)
    made.rename(target)
    print(f"wrote {target}, accuracy {fitted.score(x_check, y_check):.3f}")


if __name__ == "__main__":
    main()
