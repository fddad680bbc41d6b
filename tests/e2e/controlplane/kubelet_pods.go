package main

import (
	"math/rand"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// podTable is the pods that the kubelet knows of, admitted or not, as upstream's pod manager. The device manager and
// the PodResources server ask it from their own goroutines.
type podTable struct {
	mutex sync.Mutex
	pods  map[types.UID]knownPod
}

type knownPod struct {
	pod  *v1.Pod
	over bool // refused, or all its containers have ended
}

func newPodTable() *podTable {
	return &podTable{pods: map[types.UID]knownPod{}}
}

// put adds a pod or takes its newer version. One that was finished before we knew it is over at once.
func (t *podTable) put(pod *v1.Pod) {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	before, knew := t.pods[pod.UID]
	t.pods[pod.UID] = knownPod{pod, before.over || (!knew && isFinished(pod))}
}

func (t *podTable) markOver(uid types.UID) {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	if known, knew := t.pods[uid]; knew {
		t.pods[uid] = knownPod{known.pod, true}
	}
}

func (t *podTable) isOver(uid types.UID) bool {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	return t.pods[uid].over
}

// remove forgets a pod that is not in the API any more. Its containers may still be ending: upstream's kubelet too
// stops counting a pod's devices as soon as it is deleted by force.
func (t *podTable) remove(uid types.UID) {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	delete(t.pods, uid)
}

func (t *podTable) byUID(uid types.UID) (*v1.Pod, bool) {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	known, knew := t.pods[uid]
	return known.pod, knew
}

func (t *podTable) filter(wanted func(knownPod) bool) []*v1.Pod {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	found := []*v1.Pod{}
	for _, known := range t.pods {
		if wanted(known) {
			found = append(found, known.pod)
		}
	}
	return found
}

// GetActivePods are those that may hold devices. A pod is among them before it is admitted, and until its last
// container has ended.
func (t *podTable) GetActivePods() []*v1.Pod {
	return t.filter(func(known knownPod) bool { return !known.over })
}

// GetPods are all.
func (t *podTable) GetPods() []*v1.Pod {
	return t.filter(func(knownPod) bool { return true })
}

// GetPodByName finds a pod, active or not.
func (t *podTable) GetPodByName(namespace, name string) (*v1.Pod, bool) {
	found := t.filter(func(known knownPod) bool { return known.pod.Namespace == namespace && known.pod.Name == name })
	if len(found) == 0 {
		return nil, false
	}
	return found[0], true
}

func isFinished(pod *v1.Pod) bool {
	return pod.Status.Phase == v1.PodSucceeded || pod.Status.Phase == v1.PodFailed
}

// chance is a source of random numbers for several goroutines.
type chance struct {
	mutex  sync.Mutex
	random *rand.Rand
}

func newChance(seed int64) *chance {
	return &chance{random: rand.New(rand.NewSource(seed))}
}

func (c *chance) below(count int) int {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	return c.random.Intn(count)
}

func (c *chance) within(longest time.Duration) time.Duration {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	return time.Duration(c.random.Float64() * float64(longest))
}
