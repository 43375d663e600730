"""Ask the server for one digit with the public client library, unchanged."""

from __future__ import annotations

import numpy as np
import tritonclient.http as client
from sklearn.datasets import load_digits

images, labels = load_digits(return_X_y=True)
server = client.InferenceServerClient("127.0.0.1:8000")
image = (images[:1] / 16.0).astype(np.float32)
tensor = client.InferInput("image", image.shape, "FP32")
tensor.set_data_from_numpy(image)
scores = server.infer("digits", [tensor]).as_numpy("scores")
print(f"it is a {scores.argmax()}; it should be a {labels[0]}")
