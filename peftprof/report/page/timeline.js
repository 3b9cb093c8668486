"use strict";

// Draws each figure.timeline from the JSON beside it, and lets the reader move in it.
// Text of the trace reaches the page by textContent and fillText only, never as HTML.
(() => {
  const AXIS = 24;      // pixels of the scale above the lanes
  const NAME = 18;      // of a lane's name
  const SPANS = 24;     // of its spans
  const PHASES = 15;    // of the phases under them
  const GAP = 10;
  const NEAREST = 100;  // ns: the least that fills the width
  const UNITS = [[1e9, "s"], [1e6, "ms"], [1e3, "\u00b5s"], [1, "ns"]];

  const duration = (ns) => {
    const [size, unit] = UNITS.find(([size]) => Math.abs(ns) >= size) || UNITS[3];
    return `${Number((ns / size).toPrecision(4))} ${unit}`;
  };

  // Spans of a lane as columns, and the stretches of one phase that they make up.
  const decode = (lane) => {
    const flat = lane.spans;
    const count = flat.length / 5;
    const start = new Float64Array(count);
    const end = new Float64Array(count);
    const category = new Uint8Array(count);
    const phase = new Uint8Array(count);
    const name = new Uint32Array(count);
    const phases = [];
    let at = 0;
    for (let i = 0, j = 0; i < count; i += 1, j += 5) {
      start[i] = at + flat[j];
      at = end[i] = start[i] + flat[j + 1];
      category[i] = flat[j + 2];
      phase[i] = flat[j + 3];
      name[i] = flat[j + 4];
      const last = phases[phases.length - 1];
      if (last && last.phase === phase[i]) last.end = at;
      else phases.push({ phase: phase[i], start: start[i], end: at });
    }
    return { name: lane.name, count, start, end, category, phase, nameOf: name, phases };
  };

  // The first span of a lane that ends after `time`.
  const firstAfter = (lane, time) => {
    let low = 0;
    let high = lane.count;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (lane.end[middle] > time) high = middle;
      else low = middle + 1;
    }
    return low;
  };

  class Timeline {
    constructor(figure) {
      const data = JSON.parse(figure.querySelector("script").textContent);
      this.data = data;
      this.lanes = data.lanes.map(decode);
      this.canvas = figure.querySelector("canvas");
      this.tip = figure.querySelector(".tip");
      this.length = Math.max(data.length, 1);
      this.from = 0;
      this.to = this.length;
      this.chosen = null;
      this.drag = null;
      this.asked = false;
      const noPhase = data.phases.indexOf("other");
      let top = AXIS;
      for (const lane of this.lanes) {
        lane.top = top;
        lane.phased = lane.phases.some((stretch) => stretch.phase !== noPhase);
        top += NAME + SPANS + (lane.phased ? PHASES : 0) + GAP;
      }
      this.height = top;
      this.canvas.style.height = `${top}px`;
      this.listen(figure);
      figure.querySelector(".controls").hidden = false;
      this.draw();
    }

    listen(figure) {
      const { canvas } = this;
      for (const button of figure.querySelectorAll("button")) {
        button.addEventListener("click", () => this.act(button.dataset.do));
      }
      canvas.addEventListener("keydown", (event) => this.key(event));
      canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
      canvas.addEventListener("pointerdown", (event) => {
        this.drag = { x: event.clientX, from: this.from, to: this.to };
        canvas.setPointerCapture(event.pointerId);
      });
      canvas.addEventListener("pointermove", (event) => this.move(event));
      for (const kind of ["pointerup", "pointercancel"]) {
        canvas.addEventListener(kind, () => { this.drag = null; });
      }
      canvas.addEventListener("pointerleave", () => this.choose(null));
      canvas.addEventListener("dblclick", (event) => this.zoom(0.5, this.timeAt(event)));
      new ResizeObserver(() => this.ask()).observe(canvas);
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.ask());
    }

    // What buttons and keys do.
    act(what) {
      const quarter = (this.to - this.from) / 4;
      if (what === "in") this.zoom(0.5);
      else if (what === "out") this.zoom(2);
      else if (what === "left") this.show(this.from - quarter, this.to - quarter);
      else if (what === "right") this.show(this.from + quarter, this.to + quarter);
      else this.show(0, this.length);
    }

    key(event) {
      const acts = { "+": "in", "=": "in", "-": "out", ArrowLeft: "left", ArrowRight: "right",
        0: "all", Home: "all" };
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key in acts) this.act(acts[event.key]);
      else if (event.key === ".") this.step(1);
      else if (event.key === ",") this.step(-1);
      else if (event.key === "ArrowDown") this.change(1);
      else if (event.key === "ArrowUp") this.change(-1);
      else if (event.key === "Escape") this.choose(null);
      else return;
      event.preventDefault();
    }

    wheel(event) {
      // Elsewhere on the page the wheel is for reading on.
      const meant = event.ctrlKey || event.metaKey || document.activeElement === this.canvas;
      if (!meant) return;
      event.preventDefault();
      if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
        const by = (this.to - this.from) * (event.deltaX || event.deltaY) / this.width();
        this.show(this.from + by, this.to + by);
      } else {
        this.zoom(Math.exp(Math.max(-200, Math.min(200, event.deltaY)) / 400), this.timeAt(event));
      }
    }

    move(event) {
      if (this.drag) {
        const by = (this.drag.x - event.clientX) * (this.drag.to - this.drag.from) / this.width();
        this.show(this.drag.from + by, this.drag.to + by);
        return;
      }
      const y = event.clientY - this.canvas.getBoundingClientRect().top;
      const time = this.timeAt(event);
      const lane = this.lanes.find(({ top }) => y >= top + NAME && y < top + NAME + SPANS);
      if (!lane) return void this.choose(null);
      // A span narrower than the pointer's tip is met within two pixels.
      const near = 2 * (this.to - this.from) / this.width();
      const i = firstAfter(lane, time - near);
      this.choose(i < lane.count && lane.start[i] <= time + near ? { lane, i } : null);
    }

    zoom(factor, about = (this.from + this.to) / 2) {
      this.show(about - (about - this.from) * factor, about + (this.to - about) * factor);
    }

    show(from, to) {
      const wide = Math.min(this.length, Math.max(NEAREST, to - from));
      const middle = (from + to) / 2;
      this.from = Math.max(0, Math.min(this.length - wide, middle - wide / 2));
      this.to = this.from + wide;
      this.ask();
    }

    // The next or the previous span of the lane chosen; brings it into view.
    step(by) {
      let next = this.chosen && { lane: this.chosen.lane, i: this.chosen.i + by };
      if (!next) {
        const lane = this.lanes.find((candidate) => candidate.count);
        next = lane && { lane, i: Math.min(firstAfter(lane, this.from), lane.count - 1) };
      }
      this.reach(next);
    }

    // The span at about the same time in the next or the previous lane that has any.
    change(by) {
      if (!this.chosen) return this.step(1);
      const { lane, i } = this.chosen;
      let place = this.lanes.indexOf(lane) + by;
      while (this.lanes[place] && !this.lanes[place].count) place += by;
      const next = this.lanes[place];
      if (next) this.reach({ lane: next, i: Math.min(firstAfter(next, lane.start[i]), next.count - 1) });
    }

    reach(next) {
      if (!next || next.i < 0 || next.i >= next.lane.count) return;
      const { start, end } = next.lane;
      if (start[next.i] < this.from || end[next.i] > this.to) {
        const half = (this.to - this.from) / 2;
        const middle = (start[next.i] + end[next.i]) / 2;
        this.show(middle - half, middle + half);
      }
      this.choose(next);
    }

    choose(next) {
      const now = this.chosen;
      if (now === next || (now && next && now.lane === next.lane && now.i === next.i)) return;
      this.chosen = next;
      this.ask();
    }

    width() { return Math.max(1, this.canvas.clientWidth); }

    x(time) { return (time - this.from) / (this.to - this.from) * this.width(); }

    timeAt(event) {
      const x = event.clientX - this.canvas.getBoundingClientRect().left;
      return this.from + x / this.width() * (this.to - this.from);
    }

    ask() {
      if (this.asked) return;
      this.asked = true;
      requestAnimationFrame(() => { this.asked = false; this.draw(); });
    }

    draw() {
      const { canvas, data } = this;
      const style = getComputedStyle(canvas);
      const ratio = window.devicePixelRatio || 1;
      const width = this.width();
      const sharp = [Math.round(width * ratio), Math.round(this.height * ratio)];
      if (canvas.width !== sharp[0] || canvas.height !== sharp[1]) [canvas.width, canvas.height] = sharp;
      const pen = canvas.getContext("2d");
      pen.setTransform(ratio, 0, 0, ratio, 0, 0);
      pen.clearRect(0, 0, width, this.height);
      pen.font = `12px ${style.fontFamily}`;
      const colour = (name) => style.getPropertyValue(`--${name}`).trim();
      const paint = {
        text: colour("ink"), quiet: colour("quiet"), rule: colour("rule"), lane: colour("shade"),
        fill: data.categories.map(colour),
        on: data.categories.map((name) => colour(`on-${name}`)),
      };
      this.scale(pen, paint, width);
      for (const lane of this.lanes) this.lane(pen, paint, lane, width);
      // What is in view, for whoever asks the page (its tests do).
      canvas.dataset.from = this.from;
      canvas.dataset.to = this.to;
      this.tell(width);
    }

    scale(pen, paint, width) {
      const rough = (this.to - this.from) / Math.max(2, width / 110);
      const power = 10 ** Math.floor(Math.log10(rough));
      const step = [1, 2, 5, 10].find((times) => times * power >= rough) * power;
      pen.textAlign = "left";
      for (let i = Math.ceil(this.from / step); i * step <= this.to; i += 1) {
        const x = Math.round(this.x(i * step)) + 0.5;
        pen.fillStyle = paint.rule;
        pen.fillRect(x - 0.5, 0, 1, this.height);
        const words = duration(i * step);
        if (x + 4 + pen.measureText(words).width > width) continue;
        pen.fillStyle = paint.quiet;
        pen.fillText(words, x + 4, 13);
      }
    }

    lane(pen, paint, lane, width) {
      const top = lane.top + NAME;
      pen.fillStyle = paint.text;
      pen.fillText(lane.name, 0, lane.top + 12, width);
      pen.fillStyle = paint.lane;
      pen.fillRect(0, top, width, SPANS);
      for (let i = firstAfter(lane, this.from); i < lane.count && lane.start[i] < this.to; i += 1) {
        const left = Math.max(0, this.x(lane.start[i]));
        const wide = Math.min(width, this.x(lane.end[i])) - left;
        // Neighbours keep a hair between them where there is room for one.
        pen.fillStyle = paint.fill[lane.category[i]];
        pen.fillRect(left, top, wide > 4 ? wide - 1 : Math.max(wide, 0.5), SPANS);
        if (wide > 36) {
          pen.fillStyle = paint.on[lane.category[i]];
          this.words(pen, this.data.names[lane.nameOf[i]], left + 5, top + 16, wide - 10);
        }
      }
      if (this.chosen && this.chosen.lane === lane) {
        const { i } = this.chosen;
        pen.strokeStyle = paint.text;
        pen.lineWidth = 2;
        const left = this.x(lane.start[i]);
        pen.strokeRect(left, top, Math.max(this.x(lane.end[i]) - left, 2), SPANS);
      }
      if (!lane.phased) return;
      for (const { phase, start, end } of lane.phases) {
        if (end <= this.from || start >= this.to) continue;
        const left = Math.max(0, this.x(start));
        const wide = Math.min(width, this.x(end)) - left;
        if (wide < 2) continue;
        pen.fillStyle = paint.quiet;
        pen.fillRect(left, top + SPANS + 2, wide - 1, 1);
        if (wide > 24) this.words(pen, this.data.phases[phase], left + 1, top + SPANS + 14, wide - 4);
      }
    }

    // As much of `words` as has room.
    words(pen, words, x, y, room) {
      let shown = words.slice(0, Math.ceil(room / 3));
      while (shown && pen.measureText(shown).width > room) shown = shown.slice(0, shown.length * 0.9);
      if (shown.length < words.length) shown = shown.length > 4 ? `${shown.slice(0, -1)}\u2026` : "";
      pen.fillText(shown, x, y);
    }

    tell(width) {
      const { tip, chosen, data } = this;
      tip.hidden = !chosen;
      if (!chosen) return;
      const { lane, i } = chosen;
      const lines = [
        ["b", data.names[lane.nameOf[i]]],
        ["span", `${data.labels[lane.category[i]]}, ${data.phases[lane.phase[i]]}`],
        ["span", `${duration(lane.end[i] - lane.start[i])}, from ${duration(lane.start[i])} on`],
      ];
      tip.replaceChildren(...lines.map(([kind, words]) => {
        const line = document.createElement(kind);
        line.textContent = words;
        return line;
      }));
      const left = this.x(Math.max(lane.start[i], this.from));
      tip.style.left = `${Math.max(0, Math.min(left, width - tip.offsetWidth))}px`;
      tip.style.top = `${lane.top + NAME + SPANS + 4}px`;
    }
  }

  for (const figure of document.querySelectorAll("figure.timeline")) new Timeline(figure);
})();
