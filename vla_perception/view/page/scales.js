// Numbers → colors that color-blind people read as well: matplotlib's viridis and cividis (CC0), 33 stops of each.

const STOPS = {
  viridis:
    "440154470d6048186a482374472d7b4537814240863e49893b528b375b8d33638d2f6b8e2c728e297a8e26828e23898e21918c1f988b1fa08822a78528ae8032b67a3fbc734ec36b5ec96270cf5784d44b98d83eaddc30c2df23d8e219ece51bfde725",
  cividis:
    "00224e00285b002e6a0533711a386f273e6e32436d3b496c434e6c4b546c535a6d5a5f6e61656f686a716f70737676767d7c788482798c8878938e789b9476a39a74aba072b4a76fbcae6cc4b468cdbb63d5c25edec958e7d150f0d846f9e03afee838",
};

/** 256 colors [r, g, b] of a scale. */
function table(stops) {
  const colors = stops.match(/.{6}/g).map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  return Array.from({ length: 256 }, (_, index) => {
    const place = (index / 255) * (colors.length - 1);
    const before = Math.min(Math.floor(place), colors.length - 2);
    return [0, 1, 2].map((channel) => {
      const [low, high] = [colors[before][channel], colors[before + 1][channel]];
      return Math.round(low + (high - low) * (place - before));
    });
  });
}

export const scales = Object.fromEntries(Object.entries(STOPS).map(([name, stops]) => [name, table(stops)]));

/** Smallest and largest finite number, [0, 1] where there is none. */
export function range(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (value < low) low = value;
    if (value > high && value < Infinity) high = value;
  }
  return low <= high && low > -Infinity ? [low, high] : [0, 1];
}

/** The color of a value between `low` and `high`. */
export function color(scale, value, low, high) {
  const place = high > low ? (value - low) / (high - low) : 0.5;
  return scale[Math.max(0, Math.min(255, Math.round(place * 255)))] ?? scale[0];
}
