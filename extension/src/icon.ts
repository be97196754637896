// A lamp, drawn in the theme's colours.
import { LabIcon } from '@jupyterlab/ui-components';

const LAMP = `<svg xmlns="http://www.w3.org/2000/svg" width="16" viewBox="0 0 24 24">
  <g class="jp-icon3 jp-icon-selectable" fill="#616161">
    <path d="M2 9c2 0 3.500 1 5 3h10l4-3 1 1.500c-1.500 4-4.500 6.500-8 6.500h-4C6.500 17 4.500 12 2 11z"/>
    <path d="M8 18.500h8l1 2.500H7z"/>
    <path d="M9 10.500c0-2 6-2 6 0z"/>
    <circle cx="12" cy="7" r="1.400"/>
    <path d="M20.500 3.500c1.500 1 .5 2.200 0 3s.3 1.300 1 1.500c-2 .3-3-1-2-2.300.8-1 1.200-1.400 1-2.200z"/>
  </g>
</svg>`;

export const lampIcon = new LabIcon({ name: 'djinn-nb:lamp', svgstr: LAMP });
