"""Classify one JPEG of the model's size: the least that a cold start can be."""

import json, sys  # noqa: E401, I001
import numpy as np
import onnxruntime as ort
import simplejpeg

session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
card = json.loads(session.get_modelmeta().custom_metadata_map["tinyserve"])
pixels = simplejpeg.decode_jpeg(open(sys.argv[2], "rb").read(), "RGB")  # noqa: SIM115
shares = session.run(None, {"images": pixels[None]})[0][0]
for index in np.argsort(-shares)[:5]:
    print(f"{shares[index]:.1%} {card['labels'][index]['name']}")
