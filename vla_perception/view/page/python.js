// What was touched, as Python.

const quote = (text) => JSON.stringify(text); // a JSON string is one of Python's

/** Python that computes from the message in which a place was pinned what the page showed then. */
export function asPython(frame, pin, space) {
  const view = frame.views.findIndex((one) => one.camera === pin.camera);
  const tokens = pin.patches.map((patch) => patch + frame.first);
  const all = frame.projector === "none" || space === "projected tokens" ? "tokens.float32()" : "tokens.features_float32()";
  const whole = space === "projected tokens" || space === "encoders joined";
  const values = whole ? all : `${all}[..., tokens.encoder_channels(${quote(space)})]`;
  return `import numpy as np

from vla_perception.tokens import VisualTokens

# Message ${pin.sequence} of the page, saved with "Save pinned message".
tokens = VisualTokens.load("tokens-${pin.sequence}.safetensors")
vectors = ${values}  # [views, tokens, channels], ${space.replace(/[^\x20-\x7e]/g, "?")}
view = tokens.cameras.index(${quote(pin.camera)})${view === 0 ? "" : `  # ${view}`}
reference = vectors[view, ${JSON.stringify(tokens)}].mean(axis=0)
similarity = vectors @ reference / (np.linalg.norm(vectors, axis=-1) * np.linalg.norm(reference))
print(tokens.as_grid(similarity[..., None])[..., 0].round(3))  # [views, rows, columns]
`;
}
