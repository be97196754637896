// The pure helpers of the panels' scripts; run by test_scripts.py.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

const folder = new URL("../../djinn_nb/panels/static/", import.meta.url);

/** A script as a module; the package beside it does not say that .js files are modules. */
const load = (name) =>
  import(`data:text/javascript,${encodeURIComponent(readFileSync(new URL(name, folder), "utf8"))}`);

const { floats, linearShare, logShare, missingTiles, positiveRange, rangeOf, short, visible, windowOf } =
  await load("common.js");
const { colourOf, paint } = await load("colours.js");

test("a window holds every cell that is seen, and none beyond the axis", () => {
  assert.deepEqual(windowOf(0, 100, 20, 2000), [0, 5]);
  assert.deepEqual(windowOf(30, 100, 20, 2000), [1, 7]);
  assert.deepEqual(windowOf(39_990, 100, 20, 2000), [1999, 2000]);
  assert.deepEqual(windowOf(0, 100, 20, 0), [0, 0]);
});

test("tiles that are seen and missing, those in the middle first", () => {
  assert.deepEqual(missingTiles(100, 300, 64, () => false), [3, 2, 4, 1]);
  assert.deepEqual(missingTiles(100, 300, 64, (i) => i !== 4), [4]);
  assert.deepEqual(missingTiles(5, 5, 64, () => false), []);
  assert.deepEqual(missingTiles(0, 64, 64, () => false), [0]);
});

test("numbers in few characters", () => {
  assert.equal(short(31.234), "31.2");
  assert.equal(short(0.01234), "0.0123");
  assert.equal(short(-0.00001), "−1.0e−5");
  assert.equal(short(NaN), "NaN");
  assert.equal(short(-Infinity), "−∞");
  assert.equal(short(0), "0");
});

test("texts of tokens with their spaces visible, positions where there are none", () => {
  assert.equal(visible(" Mary\n"), "·Mary⏎");
  assert.equal(visible("", 7), "7");
  assert.equal(visible("a\u0000"), "a�");
});

test("a logarithmic scale leaves out zeros, NaN and infinities", () => {
  assert.deepEqual(positiveRange(Float32Array.of(0, NaN, 2, Infinity, 8, -3)), [2, 8]);
  assert.deepEqual(positiveRange(Float32Array.of(0, NaN)), [1, 1]);
  assert.equal(logShare(4, 2, 8), 0.5);
  assert.equal(logShare(3, 3, 3), 0.5);
});

test("a linear scale spans the finite numbers, and has a middle where there is one number", () => {
  assert.deepEqual(rangeOf(Float32Array.of(NaN, 2, -1, Infinity)), [-1, 2]);
  assert.deepEqual(rangeOf(Float32Array.of(NaN)), [0, 1]);
  assert.equal(linearShare(0.5, -1, 2), 0.5);
  assert.equal(linearShare(3, 3, 3), 0.5);
});

test("bytes at an odd offset are read, and ink contrasts with its fill", () => {
  const bytes = new Uint8Array(9);
  new DataView(bytes.buffer).setFloat32(1, 1.5, true);
  assert.deepEqual([...floats(new DataView(bytes.buffer, 1, 4))], [1.5]);
  assert.deepEqual([...floats(undefined)], []);
  assert.deepEqual(colourOf(0), [68, 1, 84]);
  assert.equal(paint(0).ink, "#fff");
  assert.equal(paint(2).ink, "#000");
});
