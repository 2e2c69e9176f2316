// The light and the dark colours of the screen, each readable on its background.

export const LIGHT = {
  background: "#ffffff", foreground: "#1b1f24", cursor: "#0b5fbd", cursorAccent: "#ffffff", selectionBackground: "#b6d6fb",
  black: "#24292f", red: "#b3261e", green: "#1a6f37", yellow: "#7d4e00", blue: "#0b5fbd", magenta: "#8250df", cyan: "#1b6f7a", white: "#6e7781",
  brightBlack: "#57606a", brightRed: "#9b1c15", brightGreen: "#116329", brightYellow: "#633c01", brightBlue: "#0a4f9e", brightMagenta: "#6639ba", brightCyan: "#115a63", brightWhite: "#424a53",
};
export const DARK = {
  background: "#11151a", foreground: "#e6e9ed", cursor: "#6cb1ff", cursorAccent: "#11151a", selectionBackground: "#2d4f77",
  black: "#3b444d", red: "#ff8f86", green: "#63d188", yellow: "#f0b04c", blue: "#6cb1ff", magenta: "#d2a8ff", cyan: "#5fd0dc", white: "#c9d1d9",
  brightBlack: "#8b949e", brightRed: "#ffb1aa", brightGreen: "#8be6a6", brightYellow: "#ffd08a", brightBlue: "#9ccbff", brightMagenta: "#e2c5ff", brightCyan: "#94e6ee", brightWhite: "#ffffff",
};
