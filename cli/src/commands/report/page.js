// Shows the numbers of the cell under the pointer, or under the cursor that the arrow keys move.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("cells-data").textContent);
  const map = document.getElementById("map");
  const readout = document.getElementById("cell");
  const pictures = [...map.querySelectorAll("svg.cells")];
  const names = ["zero", "other fill", "stored", "identical", "in ancestors", "unavailable", "hot"];
  const columns = 64, side = 20;
  let group = 0, cell = 0;

  const number = (n) => n.toLocaleString("en-US");
  const bytes = (n) => {
    const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let unit = 0;
    while (n >= 1024 && unit < units.length - 1) { n /= 1024; unit += 1; }
    return `${n.toFixed(unit ? 2 : 0)} ${units[unit]}`;
  };

  function show() {
    const { name, start, cells } = data.groups[group];
    const numbers = cells[cell];
    const pages = numbers.slice(0, 6).reduce((sum, n) => sum + n, 0);
    let where = name;
    if (start !== null) {
      const size = BigInt(data.cell_pages) * 4096n;
      const from = BigInt(start) + BigInt(cell) * size;
      const to = from + BigInt(pages) * 4096n;
      where += ` 0x${from.toString(16)}\u20130x${to.toString(16)}`;
    }
    const parts = names.map((what, i) => numbers[i] && `${number(numbers[i])} ${what}`).filter(Boolean);
    const stored = numbers[7] ? `; ${bytes(numbers[7])} in the file` : "";
    readout.textContent = `${where}: ${number(pages)} pages: ${parts.join(", ")}${stored}`;
    document.querySelectorAll(".cursor").forEach((old) => old.remove());
    const cursor = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    cursor.setAttribute("class", "cursor");
    cursor.setAttribute("x", (cell % columns) * side + 1);
    cursor.setAttribute("y", Math.floor(cell / columns) * side + 1);
    cursor.setAttribute("width", side - 2);
    cursor.setAttribute("height", side - 2);
    pictures[group].append(cursor);
  }

  function move(steps) {
    let next = cell + steps;
    if (next < 0 && group > 0) {
      group -= 1;
      next = data.groups[group].cells.length - 1;
    } else if (next >= data.groups[group].cells.length && group + 1 < pictures.length) {
      group += 1;
      next = 0;
    }
    cell = Math.max(0, Math.min(next, data.groups[group].cells.length - 1));
    show();
    pictures[group].scrollIntoView({ block: "nearest" });
  }

  if (pictures.length === 0) return;
  readout.hidden = false;
  map.tabIndex = 0;
  map.setAttribute("role", "application");
  map.setAttribute("aria-label", "Map of the memory; the arrow keys move from cell to cell");
  map.addEventListener("focus", show);
  map.addEventListener("keydown", (event) => {
    const steps = {
      ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns,
      Home: -cell, End: data.groups[group].cells.length - 1 - cell,
    }[event.key];
    if (steps === undefined) return;
    event.preventDefault();
    move(steps);
  });
  map.addEventListener("pointermove", (event) => {
    const picture = event.target.closest("svg.cells");
    if (!picture) return;
    const box = picture.getBoundingClientRect();
    const scale = picture.viewBox.baseVal.width / box.width;
    const x = Math.floor(((event.clientX - box.left) * scale) / side);
    const y = Math.floor(((event.clientY - box.top) * scale) / side);
    const pointed = Number(picture.dataset.group);
    if (x < columns && y * columns + x < data.groups[pointed].cells.length) {
      group = pointed;
      cell = y * columns + x;
      show();
    }
  });
})();
