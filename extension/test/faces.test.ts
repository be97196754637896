import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { faces } from '../src/faces';
import type { View } from '../src/tokens';
import { english, session, snapshot, view } from './briefs';

const trouble = (code: string) => ({
  level: 'error' as const,
  code,
  text: 'what happened',
  advice: 'what to do'
});

/** state -> the view of it, and what its buttons do */
const STATES: [string, View, string[]][] = [
  ['NoNotebook', view({ link: 'no-notebook', snapshot: null }), []],
  [
    'NoKernel',
    view({ link: 'no-kernel', snapshot: null }),
    ['notebook:change-kernel']
  ],
  ['KernelStarting', view({ link: 'starting', snapshot: null }), []],
  [
    'KernelDead',
    view({ link: 'dead', snapshot: null }),
    ['notebook:restart-kernel']
  ],
  [
    'NotPython',
    view({ link: 'foreign', snapshot: null }),
    ['notebook:change-kernel']
  ],
  ['NotLoaded', view({ link: 'not-loaded', snapshot: null }), ['djinn:load']],
  ['Waiting', view({ snapshot: null }), []],
  [
    'NotConnected',
    view({ snapshot: snapshot({ connection: 'none' }) }),
    ['connect', 'connect']
  ],
  [
    'Connecting',
    view({ snapshot: snapshot({ connection: 'connecting' }) }),
    []
  ],
  [
    'ModelLoading',
    view({
      snapshot: snapshot({
        connection: 'loading',
        progress: { text: 'loading the model, 3 of 4 files', done: 0.75 }
      })
    }),
    []
  ],
  [
    'ConnectionLost',
    view({
      snapshot: snapshot({
        connection: 'lost',
        notice: trouble('ConnectionLost')
      })
    }),
    ['connect', 'connect']
  ],
  [
    'AccessDenied',
    view({
      snapshot: snapshot({
        connection: 'denied',
        notice: trouble('AccessDenied')
      })
    }),
    ['connect']
  ],
  [
    'TakenOver',
    view({
      snapshot: snapshot({ notice: trouble('TakenOver'), can: ['look'] })
    }),
    ['look']
  ],
  [
    'NothingStopped',
    view({ snapshot: snapshot({ sessions: [], session_id: null }) }),
    ['launch']
  ],
  ['NoSubshells', view({ urgent: false }), []],
  [
    'WaitingForKernel',
    view({ urgent: false, waiting: true }),
    ['notebook:interrupt-kernel']
  ],
  [
    'StaleStop',
    view({ snapshot: snapshot({ notice: trouble('StaleStop') }) }),
    ['dismiss']
  ]
];

describe('a face', () => {
  for (const [code, shown, deeds] of STATES) {
    it(`says what happened and what to do: ${code}`, () => {
      const [face] = faces(shown, english);

      assert.equal(face.code, code);
      assert.ok(face.text.length > 10);
      assert.ok(face.advice.length > 9);
      assert.deepEqual(
        face.buttons.map(button => Object.values(button.deed)[0]),
        deeds
      );
    });
  }

  it('is not shown when something is stopped and all is well', () => {
    assert.deepEqual(faces(view(), english), []);
  });

  it('tells how far a model is loaded', () => {
    const loading = snapshot({
      connection: 'loading',
      progress: { text: 'loading the model', done: 0.75 }
    });

    assert.equal(faces(view({ snapshot: loading }), english)[0].progress, 0.75);
  });

  it('of a lost server comes once, and the last state stays shown', () => {
    const lost = snapshot({
      connection: 'lost',
      notice: trouble('ConnectionLost'),
      sessions: [session()]
    });

    assert.equal(faces(view({ snapshot: lost }), english).length, 1);
  });
});
