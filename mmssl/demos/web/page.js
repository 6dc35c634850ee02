// Draws the heat of every .mmssl-stage over its video, at the time that is being shown.
(() => {
  const PALETTE = __PALETTE__;
  const SIDE = 256;        // pixels of the canvas, before the page scales it
  const STRENGTH = 0.9;    // opacity where the heat is 1
  let threshold = __THRESHOLD__;
  window.mmssl = { threshold: (value) => { threshold = value; } };

  function prepare(stage) {
    const heat = JSON.parse(stage.dataset.heat);
    const bytes = Uint8Array.from(atob(heat.maps), (c) => c.charCodeAt(0));
    const [count, height, width] = heat.shape;
    const cells = new OffscreenCanvas(width, height);
    stage.mmssl = { ...heat, bytes, count, height, width, cells, drawn: "" };
    const canvas = stage.querySelector("canvas");
    canvas.width = canvas.height = SIDE;
    const curves = stage.querySelector(".mmssl-curves"), video = stage.querySelector("video");
    curves.addEventListener("click", (event) => {
      video.currentTime = video.duration * event.offsetX / curves.clientWidth;
    });
  }

  // the two bins around a time and the share of the later one
  function around(times, now) {
    let right = times.findIndex((t) => t >= now);
    if (right < 0) right = times.length - 1;
    const left = now >= times[right] ? right : Math.max(0, right - 1);
    const gap = times[right] - times[left];
    return [left, right, gap > 0 ? (now - times[left]) / gap : 0];
  }

  function paint(stage) {
    if (!stage.mmssl) prepare(stage);
    const heat = stage.mmssl, video = stage.querySelector("video");
    const canvas = stage.querySelector("canvas");
    const what = `${video.currentTime} ${threshold} ${video.videoWidth}`;
    if (heat.drawn === what || !video.videoWidth) return;
    heat.drawn = what;
    const [left, right, raw] = around(heat.times, video.currentTime);
    const share = Math.min(1, Math.max(0, raw)), size = heat.height * heat.width;
    const grey = new ImageData(heat.width, heat.height);
    for (let k = 0; k < size; k++) {
      const a = heat.bytes[left * size + k], b = heat.bytes[right * size + k];
      grey.data.set([(1 - share) * a + share * b, 0, 0, 255], 4 * k);
    }
    heat.cells.getContext("2d").putImageData(grey, 0, 0);
    // maps of a model that reads squares lie on the largest square in the middle
    const ratio = heat.whole ? 1 : video.videoWidth / video.videoHeight;
    const w = SIDE * Math.min(1, 1 / ratio), h = SIDE * Math.min(1, ratio);
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.clearRect(0, 0, SIDE, SIDE);
    context.imageSmoothingQuality = "high";
    context.drawImage(heat.cells, (SIDE - w) / 2, (SIDE - h) / 2, w, h);
    const pixels = context.getImageData(0, 0, SIDE, SIDE), data = pixels.data;
    let hot = 0;
    for (let k = 0; k < data.length; k += 4) {
      const level = data[k];
      const shown = data[k + 3] > 0 && level > 0 && level >= 255 * threshold;
      hot += shown;
      const [red, green, blue] = PALETTE[level];
      data[k] = red; data[k + 1] = green; data[k + 2] = blue;
      data[k + 3] = shown ? STRENGTH * level : 0;
    }
    context.putImageData(pixels, 0, 0);
    stage.dataset.hot = (hot / SIDE / SIDE).toFixed(4);
    const line = stage.querySelector(".mmssl-curves line");
    const x = 600 * video.currentTime / video.duration;
    line.setAttribute("x1", x);
    line.setAttribute("x2", x);
  }

  function draw() {
    document.querySelectorAll(".mmssl-stage").forEach(paint);
    requestAnimationFrame(draw);
  }
  requestAnimationFrame(draw);
})();
