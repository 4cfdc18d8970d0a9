
"use strict";
// Values under the pointer: each .probe lies over the axes of one figure and knows its grid, or its points.
(() => {
  const maps = JSON.parse(document.getElementById("landscape-data").textContent);
  const minus = (text) => text.replace(/-/g, "−");
  const number = (value) => (value === null ? "not defined" : minus(String(Number(value.toPrecision(4)))));
  // As many decimals as the standard error has up to its second digit.
  const withError = (value, error) => {
    if (value === null || !(error > 0)) return number(value);
    const decimals = Math.min(12, Math.max(0, 1 - Math.floor(Math.log10(error))));
    return `${minus(value.toFixed(decimals))} ± ${error.toFixed(decimals)}`;
  };

  const nearest = (axis, value) => {
    let best = 0;
    axis.forEach((at, i) => {
      if (Math.abs(at - value) < Math.abs(axis[best] - value)) best = i;
    });
    return best;
  };

  const put = (readout, name, text) => {
    const term = document.createElement("dt");
    const value = document.createElement("dd");
    term.textContent = name;
    value.textContent = text;
    readout.append(term, value);
  };

  // A cloud of points: the nearest one on the screen; the arrow keys go through them from left to right.
  const cloud = (probe, map, figure) => {
    const pin = figure.querySelector(".pin");
    const readout = figure.querySelector(".readout");
    const [left, bottom, width, height] = map.axes;
    probe.style.left = `${100 * left}%`;
    probe.style.top = `${100 * (1 - bottom - height)}%`;
    probe.style.width = `${100 * width}%`;
    probe.style.height = `${100 * height}%`;
    let at = 0;
    const show = (i) => {
      at = i;
      readout.replaceChildren();
      for (const row of map.rows) {
        const value = row.values[i];
        if (value === null) continue;
        put(readout, row.name, typeof value === "string" ? value : number(value));
      }
    };
    const pinned = (i) => {
      pin.style.left = `${100 * (left + width * map.x[i])}%`;
      pin.style.top = `${100 * (1 - bottom - height * map.y[i])}%`;
      pin.hidden = false;
      show(i);
    };
    const point = (event) => {
      const box = probe.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width;
      const y = 1 - (event.clientY - box.top) / box.height;
      const far = (i) => ((map.x[i] - x) * box.width) ** 2 + ((map.y[i] - y) * box.height) ** 2;
      let best = 0;
      map.x.forEach((_, i) => {
        if (far(i) < far(best)) best = i;
      });
      if (best !== at || pin.hidden) pinned(best);
    };
    probe.addEventListener("mousemove", point);
    probe.addEventListener("pointerdown", point);
    probe.addEventListener("focus", () => {
      pinned(at);
    });
    probe.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      pinned(Math.max(0, Math.min(map.x.length - 1, at + step)));
    });
    show(0);
  };

  for (const probe of document.querySelectorAll(".probe")) {
    const map = maps[probe.dataset.map];
    const figure = probe.closest("figure");
    if (map.x) {
      cloud(probe, map, figure);
      continue;
    }
    const pin = figure.querySelector(".pin");
    const readout = figure.querySelector(".readout");
    const [left, bottom, width, height] = map.axes;
    const [x0, x1] = map.xlim;
    const [y0, y1] = map.ylim;
    probe.style.left = `${100 * left}%`;
    probe.style.top = `${100 * (1 - bottom - height)}%`;
    probe.style.width = `${100 * width}%`;
    probe.style.height = `${100 * height}%`;
    let at = [0, 0];

    const pinned = (i, j) => {
      const x = (map.alpha[i] - x0) / (x1 - x0);
      const y = (map.beta[j] - y0) / (y1 - y0);
      pin.style.left = `${100 * (left + width * x)}%`;
      pin.style.top = `${100 * (1 - bottom - height * y)}%`;
      pin.hidden = false;
      show(i, j);
    };

    const show = (i, j) => {
      at = [i, j];
      readout.replaceChildren();
      put(readout, "α", number(map.alpha[i]));
      put(readout, "β", number(map.beta[j]));
      for (const row of map.rows) {
        put(readout, row.name, withError(row.values[i][j], row.errors ? row.errors[i][j] : null));
      }
    };

    const point = (event) => {
      const box = probe.getBoundingClientRect();
      const x = x0 + ((event.clientX - box.left) / box.width) * (x1 - x0);
      const y = y1 - ((event.clientY - box.top) / box.height) * (y1 - y0);
      const i = nearest(map.alpha, x);
      const j = nearest(map.beta, y);
      if (at[0] !== i || at[1] !== j || pin.hidden) pinned(i, j);
    };
    probe.addEventListener("mousemove", point);
    probe.addEventListener("pointerdown", point);
    probe.addEventListener("focus", () => {
      pinned(...at);
    });
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
    probe.addEventListener("keydown", (event) => {
      const move = moves[event.key];
      if (!move) return;
      event.preventDefault();
      const clamp = (value, axis) => Math.max(0, Math.min(axis.length - 1, value));
      pinned(clamp(at[0] + move[0], map.alpha), clamp(at[1] + move[1], map.beta));
    });
    show(nearest(map.alpha, 0), nearest(map.beta, 0));
  }
})();
