// Tiles: one canvas for each camera and space, an image with what its tokens say over it.

import { color, range, scales } from "./scales.js";

/** The patch that sees pixel (x, y) of a view's image, row by row from 0; -1 where none does. */
export function patchAt(view, grid, x, y) {
  const [a, b, c, d, e, f] = view.affine;
  const [left, top, right, bottom] = view.roi ?? [0, 0, view.width, view.height];
  const [column, row] = [Math.floor(a * x + b * y + c + 1e-9), Math.floor(d * x + e * y + f + 1e-9)];
  const inside = left <= x && x < right && top <= y && y < bottom;
  return inside && row >= 0 && row < grid[0] && column >= 0 && column < grid[1] ? row * grid[1] + column : -1;
}

/** Grid (column, row) → pixels of the image, as the arguments of `CanvasRenderingContext2D.transform`. */
export function gridToImage([a, b, c, d, e, f]) {
  const determinant = a * e - b * d;
  return [e, -d, -b, a, b * f - c * e, c * d - a * f].map((value) => value / determinant);
}

/** The corners [x, y] of a patch in pixels of the image. */
export function corners(view, grid, patch) {
  const [m11, m12, m21, m22, dx, dy] = gridToImage(view.affine);
  const [row, column] = [Math.floor(patch / grid[1]), patch % grid[1]];
  return [[0, 0], [1, 0], [1, 1], [0, 1]].map(([right, down]) => {
    const [u, v] = [column + right, row + down];
    return [m11 * u + m21 * v + dx, m12 * u + m22 * v + dy];
  });
}

/** The middle [x, y] of a patch in pixels of the image. */
export function middle(view, grid, patch) {
  const points = corners(view, grid, patch);
  return [0, 1].map((axis) => points.reduce((sum, point) => sum + point[axis], 0) / 4);
}

export class Tiles {
  /**
   * `onTouch(camera, box, hold)`: a place was touched, in pixels; `onPoint(view, space, patch)`: the pointer is there,
   * a patch of -1 for nowhere; `onRelease()`: Escape.
   */
  constructor(element, legends, { onTouch, onPoint, onRelease }) {
    Object.assign(this, { element, legends, onTouch, onPoint, onRelease });
    this.opacity = 0.6;
    this.scale = "viridis";
    this.tiles = [];
    this.bitmaps = [];
    this.frame = null;
    this.shown = null;
    new ResizeObserver(() => this.paint()).observe(element);
  }

  /** A new message: decodes its images, then paints. Resolves when it can be seen. */
  async show(frame) {
    const bitmaps = await Promise.all(
      frame.views.map((view) =>
        view.image === null
          ? null
          : createImageBitmap(new Blob([frame.bytes(view.image)], { type: view.image_kind })).catch(() => null),
      ),
    );
    for (const bitmap of this.bitmaps) bitmap?.close();
    this.bitmaps = bitmaps;
    this.frame = frame;
    this.layers(frame);
  }

  /** What is painted over the images of the message that is shown. */
  layers(message) {
    if (this.frame === null || message.sequence !== this.frame.sequence || message.topic !== this.frame.topic) return;
    this.arrange(message.layers);
    this.shown = {
      mode: message.mode,
      pin: message.pin,
      spaces: message.layers.map((layer) => ({
        space: layer.space,
        norms: message.floats(layer.norms),
        colors: layer.colors === undefined ? null : message.bytes(layer.colors),
        values: this.values(message, layer),
      })),
    };
    for (const space of this.shown.spaces) space.range = space.values === null ? [0, 1] : this.bounds(space.values);
    this.paint();
  }

  values(message, layer) {
    const number = { norm: layer.norms, change: layer.change, similarity: layer.similarity }[message.mode];
    return number === undefined || number === null ? null : message.floats(number);
  }

  /** Smallest and largest value in the views that are valid. */
  bounds(values) {
    const count = values.length / this.frame.views.length;
    const valid = this.frame.views.flatMap((view, index) =>
      view.valid ? Array.from(values.subarray(index * count, (index + 1) * count)) : [],
    );
    return range(valid);
  }

  clear(text) {
    for (const bitmap of this.bitmaps) bitmap?.close();
    Object.assign(this, { bitmaps: [], frame: null, shown: null, tiles: [] });
    const empty = document.createElement("p");
    empty.className = "empty";
    empty.textContent = text;
    this.element.replaceChildren(empty);
    this.legends.replaceChildren();
  }

  /** Makes the tiles that this message needs, if they are not there. */
  arrange(layers) {
    const { views } = this.frame;
    const spaces = layers.length ? layers.map((layer) => layer.space) : [""];
    const wanted = JSON.stringify([views.map((view) => [view.camera, view.width, view.height]), spaces]);
    const narrow = this.element.clientWidth < 560;
    const columns = narrow ? Math.min(2, spaces.length) : Math.max(2, spaces.length);
    this.element.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
    if (wanted === this.arranged && this.tiles.length) return;
    this.arranged = wanted;
    this.tiles = views.flatMap((view, index) => spaces.map((space) => new Tile(this, index, view, space)));
    this.element.replaceChildren(...this.tiles.map((tile) => tile.figure));
  }

  paint() {
    if (this.frame === null || this.shown === null) return;
    for (const tile of this.tiles) tile.paint();
    this.paintLegends();
  }

  paintLegends() {
    const scale = scales[this.scale];
    this.legends.replaceChildren(
      ...this.shown.spaces
        .filter((space) => space.values !== null)
        .map((space) => {
          const entry = document.createElement("span");
          const bar = document.createElement("canvas");
          [bar.width, bar.height] = [256, 1];
          const context = bar.getContext("2d");
          const pixels = context.createImageData(256, 1);
          scale.forEach((rgb, index) => pixels.data.set([...rgb, 255], 4 * index));
          context.putImageData(pixels, 0, 0);
          const [low, high] = space.range.map((value) => value.toPrecision(3));
          entry.append(`${space.space} ${low}`, bar, high);
          return entry;
        }),
    );
  }

  space(name) {
    return this.shown?.spaces.find((space) => space.space === name) ?? null;
  }
}

class Tile {
  constructor(tiles, index, view, space) {
    Object.assign(this, { tiles, index, space, cursor: -1, drag: null });
    this.figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    const name = document.createElement("b");
    name.textContent = view.camera;
    caption.append(name, space ? ` ${space}` : "");
    this.caption = caption;
    this.canvas = document.createElement("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "application");
    this.canvas.setAttribute("aria-roledescription", "image with tokens over it");
    this.canvas.setAttribute(
      "aria-label",
      `${view.camera} ${space}: arrow keys choose a patch, Enter pins it, Escape releases it`,
    );
    this.figure.append(caption, this.canvas);
    this.canvas.addEventListener("pointermove", (event) => this.onMove(event));
    this.canvas.addEventListener("pointerdown", (event) => this.onDown(event));
    this.canvas.addEventListener("pointerup", (event) => this.onUp(event));
    this.canvas.addEventListener("pointercancel", () => (this.drag = null));
    this.canvas.addEventListener("pointerleave", () => this.point(-1));
    this.canvas.addEventListener("keydown", (event) => this.onKey(event));
  }

  get view() {
    return this.tiles.frame.views[this.index];
  }

  /** The event's place in pixels of the image. */
  place(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * this.view.width;
    const y = ((event.clientY - box.top) / box.height) * this.view.height;
    return [Math.max(0, Math.min(this.view.width - 1e-3, x)), Math.max(0, Math.min(this.view.height - 1e-3, y))];
  }

  point(patch) {
    if (patch === this.cursor) return;
    this.cursor = patch;
    this.tiles.onPoint(this.view, this.space, patch);
    this.paint();
  }

  onMove(event) {
    const place = this.place(event);
    if (this.drag !== null) {
      this.drag.to = place;
      this.paint();
    } else if (this.tiles.frame.grid !== null) {
      this.point(patchAt(this.view, this.tiles.frame.grid, ...place));
    }
  }

  onDown(event) {
    if (event.button !== 0 || this.tiles.frame.grid === null) return;
    const place = this.place(event);
    if (event.pointerType === "mouse") this.canvas.setPointerCapture(event.pointerId);
    this.drag = { from: place, to: place };
  }

  onUp(event) {
    if (this.drag === null) return;
    const [from, to] = [this.drag.from, this.place(event)];
    this.drag = null;
    const box = [Math.min(from[0], to[0]), Math.min(from[1], to[1]), Math.max(from[0], to[0]), Math.max(from[1], to[1])];
    const small = (box[2] - box[0]) / this.view.width < 0.02 && (box[3] - box[1]) / this.view.height < 0.02;
    this.tiles.onTouch(this.view.camera, small ? [...from, ...from] : box, true);
  }

  onKey(event) {
    const grid = this.tiles.frame.grid;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -(grid?.[1] ?? 0), ArrowDown: grid?.[1] ?? 0 }[event.key];
    if (event.key === "Escape") this.tiles.onRelease();
    if (grid === null || (step === undefined && event.key !== "Enter" && event.key !== " ")) return;
    event.preventDefault();
    if (step !== undefined) {
      const central = Math.floor(grid[0] / 2) * grid[1] + Math.floor(grid[1] / 2);
      const next = this.cursor < 0 ? central : this.cursor + step;
      if (next >= 0 && next < grid[0] * grid[1]) this.point(next);
    } else if (this.cursor >= 0) {
      const place = middle(this.view, grid, this.cursor);
      this.tiles.onTouch(this.view.camera, [...place, ...place], true);
    }
  }

  paint() {
    const { frame, shown } = this.tiles;
    if (frame === null || shown === null || this.view === undefined) return;
    const width = Math.round(this.canvas.clientWidth * devicePixelRatio);
    const scale = width / this.view.width;
    const height = Math.min(Math.round(this.view.height * scale), 4 * width);
    if (!(width > 0 && height > 0 && scale < Infinity)) return;
    if (this.canvas.width !== width || this.canvas.height !== height) {
      [this.canvas.width, this.canvas.height] = [width, height];
      this.canvas.style.aspectRatio = `${width} / ${height}`;
    }
    const context = this.canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, width, height);
    const bitmap = this.tiles.bitmaps[this.index];
    if (bitmap) context.drawImage(bitmap, 0, 0, width, height);
    context.setTransform(scale, 0, 0, scale, 0, 0);
    const space = this.tiles.space(this.space);
    if (space !== null && this.view.valid) this.paintLayer(context, space, bitmap ? this.tiles.opacity : 1);
    this.paintMarks(context, scale);
    const late = Math.abs(this.view.image_late_ms ?? 0) > 1 ? `, image ${this.view.image_late_ms.toFixed(0)} ms apart` : "";
    const missing = this.view.image === null ? ", no image received" : late;
    this.caption.title = `${this.view.camera} ${this.space}${missing}`;
    this.caption.lastChild.textContent = ` ${this.space}${this.view.valid ? missing : ", not valid"}`;
  }

  paintLayer(context, space, opacity) {
    const { frame, shown } = this.tiles;
    const [rows, columns] = frame.grid;
    if (shown.mode === "image" || (space.colors === null && space.values === null)) return;
    this.cells ??= new OffscreenCanvas(columns, rows);
    if (this.cells.width !== columns || this.cells.height !== rows) this.cells = new OffscreenCanvas(columns, rows);
    const cells = this.cells.getContext("2d");
    const pixels = cells.createImageData(columns, rows);
    const start = this.index * rows * columns;
    for (let patch = 0; patch < rows * columns; patch++) {
      const rgb =
        space.colors !== null
          ? space.colors.subarray(3 * (start + patch), 3 * (start + patch) + 3)
          : color(scales[this.tiles.scale], space.values[start + patch], ...space.range);
      pixels.data.set(rgb, 4 * patch);
      pixels.data[4 * patch + 3] = 255;
    }
    cells.putImageData(pixels, 0, 0);
    context.save();
    const [left, top, right, bottom] = this.view.roi ?? [0, 0, this.view.width, this.view.height];
    context.beginPath();
    context.rect(left, top, right - left, bottom - top); // what was cropped away is not seen
    context.clip();
    context.globalAlpha = opacity;
    context.imageSmoothingEnabled = false;
    context.transform(...gridToImage(this.view.affine));
    context.drawImage(this.cells, 0, 0);
    context.restore();
  }

  /** The patch under the pointer, what is pinned, and the box that is being dragged. */
  paintMarks(context, scale) {
    const { frame, shown } = this.tiles;
    if (frame.grid === null) return;
    const outline = (patch, width) => {
      context.beginPath();
      for (const point of corners(this.view, frame.grid, patch)) context.lineTo(...point);
      context.closePath();
      for (const [stroke, thick] of [["#000", width + 1.5], ["#fff", width]]) {
        context.strokeStyle = stroke;
        context.lineWidth = (thick * devicePixelRatio) / scale;
        context.stroke();
      }
    };
    if (shown.pin?.hold && shown.pin.camera === this.view.camera) for (const patch of shown.pin.patches) outline(patch, 1.5);
    if (this.cursor >= 0) outline(this.cursor, 1);
    if (this.drag !== null) {
      const { from, to } = this.drag;
      context.lineWidth = (2 * devicePixelRatio) / scale;
      context.strokeStyle = "#fff";
      context.strokeRect(from[0], from[1], to[0] - from[0], to[1] - from[1]);
    }
  }
}
