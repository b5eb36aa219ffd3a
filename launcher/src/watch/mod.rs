mod leak;
mod level;
