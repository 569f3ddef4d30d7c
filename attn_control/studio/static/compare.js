// The slider between two pictures, and two films that show the same frame.
let playing = null;

function show(figure, frame) {
  const count = Number(figure.dataset.count);
  for (const film of figure.querySelectorAll(".ac-film")) {
    const columns = Number(film.dataset.columns), rows = Number(film.dataset.rows);
    const x = columns > 1 ? (100 * (frame % columns)) / (columns - 1) : 0;
    const y = rows > 1 ? (100 * Math.floor(frame / columns)) / (rows - 1) : 0;
    film.style.backgroundPosition = `${x}% ${y}%`;
    film.dataset.frame = frame;
  }
  figure.querySelector(".ac-time").value = frame;
  figure.querySelector("output").textContent = `${frame + 1} of ${count}`;
}

function stop() {
  clearInterval(playing);
  playing = null;
  const button = element.querySelector(".ac-play");
  if (button) { button.textContent = "play"; button.setAttribute("aria-pressed", "false"); }
}

element.addEventListener("input", (event) => {
  if (event.target.matches(".ac-slider"))
    event.target.closest(".ac-compare").style.setProperty("--cut", `${event.target.value}%`);
  if (event.target.matches(".ac-time")) {
    stop();
    show(event.target.closest(".ac-players"), Number(event.target.value));
  }
});

element.addEventListener("click", (event) => {
  const button = event.target.closest(".ac-play");
  if (!button) return;
  if (playing) return stop();
  button.textContent = "pause";
  button.setAttribute("aria-pressed", "true");
  playing = setInterval(() => {
    const figure = element.querySelector(".ac-players");
    if (!figure) return stop();
    const time = figure.querySelector(".ac-time");
    show(figure, (Number(time.value) + 1) % Number(figure.dataset.count));
  }, 125);
});

watch("value", stop);
